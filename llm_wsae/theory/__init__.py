"""The paper's theory as code, and the planted data on which its claims can be tested."""
