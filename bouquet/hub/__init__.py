"""The hub operator's side: who takes part, runs, the deployment on this host, the hub's page."""
