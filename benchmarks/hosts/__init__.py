"""Several hosts on one machine: what a cluster does when they die."""
