"""Will it fit: memory by arithmetic, and by compiling the train step without weights or device."""
