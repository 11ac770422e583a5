"""A trial: does reinforcement teach a tiny model more than other training (the controls) in the same time?"""
