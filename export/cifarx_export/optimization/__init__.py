"""Find the best artifact of a network: make candidates, prove and measure each of them, and pick one."""
