"""How long a federated round takes, beside what its arithmetic costs and beside a plain implementation."""
