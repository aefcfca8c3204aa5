"""What answers a model between its turns: tools that it calls, environments that it acts in, in processes apart."""
