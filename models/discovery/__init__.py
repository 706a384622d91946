"""The roles of a network's parameters, found by building it at three sizes and watching one forward pass."""
