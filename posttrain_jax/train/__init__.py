"""From a config to a run folder: settings, assembly, the step, the loop, sweeps, export."""
