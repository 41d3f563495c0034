"""A codec in one room: options, reduction on the device, targets, conversion, reconstruction."""
