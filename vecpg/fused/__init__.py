"""Whole iterations on a GPU: {rollout, returns, baseline, gradient, Adam} as one CUDA graph."""
