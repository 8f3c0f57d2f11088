"""The kernels in Triton. Imported where a GPU holds the weights, or where Triton's interpreter is to run them."""
