"""The judges of the drawn world are taught here: what they see, what they are asked, what they are worth.

Knows the drawn world and its video VAE. Only the critic knows the model that is judged.
"""
