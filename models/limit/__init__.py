"""What networks of infinite width, and of infinite depth, do: solvers of the theory's equations (docs/theory.md).

kernels    the lazy limit: feature, gradient and tangent kernels at a finite depth, and by an ODE in depth
linear     exact training of deep linear residual networks
rich       Monte Carlo training of ReLU and tanh networks that learn features
drift      what all this predicts of a study: the largest stable rate, and how it moves with depth
finite     the network itself, of a finite size, under this package's rules

Bordelon et al. (arXiv 2309.16620) derive the limit, Bordelon and Pehlevan (2205.09653) the equations of plain networks.
"""
