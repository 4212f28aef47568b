"""Make the reward model and the policies: the ALMoST recipe, stage by stage."""
