"""A person's taste as a reward: votes on groups of images, and a head on frozen image features that learns from them.

votes          votes on disk, and what a ranking scores
comparisons    which of two images was preferred
bradley_terry  the fit, and how much a new vote would tell
encoders       the frozen image features
learned        a fitted taste: training, file, reward
human          the reward that asks a person
"""
