"""Several hosts on one machine: how a cluster behaves when they die."""
