"""The whole job: plan, harvest, weigh, train, evaluate."""
