"""What makes many processes one job: who is who, where the network is, what all agree on, how all end together.

Every launcher is read in one place (`launcher_env`), the worlds of the two roles are opened in one place
(`rendezvous`). Nothing here knows what the job computes.
"""
