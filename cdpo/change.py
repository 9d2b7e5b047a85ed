"""theta - theta_0: what training did to the weights. Knows that an adapter's change is its product, not its factors."""
