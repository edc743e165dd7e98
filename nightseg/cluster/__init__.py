"""How work is spread over a machine or a cluster with Ray; no words of the domain."""
