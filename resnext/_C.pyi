# The compiled extension: an empty module whose import registers torch.ops.resnext_C (see csrc/bindings.cpp).
