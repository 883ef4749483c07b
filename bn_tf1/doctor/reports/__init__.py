"""How an examination is shown.

terminal            text, as wide as the terminal
page, charts        one HTML page, and what is drawn on it
machine_readable    JSON
grouping            what belongs together: findings of one check, layers alike
"""
