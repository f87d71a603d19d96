"""Analysis: influence, cuts, hidden groups, sites and hidden-to-weight relations of one step."""
