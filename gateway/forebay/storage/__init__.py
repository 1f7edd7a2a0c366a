"""The cache's storage: files, devices and logical volumes, made, enlarged, checked and given back."""
