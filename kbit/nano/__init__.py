"""The nano models and tasks: a k-bit study that runs offline."""
