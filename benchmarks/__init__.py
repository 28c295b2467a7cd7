"""How fast and how good are featcache and heads, beside their peers in the same run?

``python -m benchmarks`` lists the questions; each is a script of this package.
"""
