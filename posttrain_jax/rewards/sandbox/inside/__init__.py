"""What runs inside of the sandbox: it imports the standard library and nothing of the package but this folder."""
