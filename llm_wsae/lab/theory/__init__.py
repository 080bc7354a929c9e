"""The paper's theorems as code, and its toy experiment."""
