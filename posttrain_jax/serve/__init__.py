"""One base and many adapters, served: the worker that owns the device, and what speaks to it over HTTP."""
