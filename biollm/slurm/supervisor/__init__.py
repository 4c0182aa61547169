"""What runs on the compute node: the supervisor of vLLM and its authentication middleware. Standard library only."""
