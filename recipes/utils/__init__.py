"""What the recipes share: packages of one job each, whose imports run one way, from `console` up."""
