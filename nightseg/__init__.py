"""nightseg"""
