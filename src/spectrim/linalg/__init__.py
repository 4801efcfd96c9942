"""Pure functions of tensors. No modules, no files, no global state; nothing but torch is imported here.

Letters used in all files of this folder: O outputs, I inputs, K components, R rank, N tokens, L layers.
"""
