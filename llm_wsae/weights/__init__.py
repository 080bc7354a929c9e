"""Loss weights: rules, the scores they give, and the weights γ or matrix Γ made from them."""
