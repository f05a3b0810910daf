import torch, torch.nn.functional as F
def margins(policy, reference):
    ratio = policy - reference
    return ratio[:, 1] - ratio[:, 2]
def preference_loss(delta, beta):
    return -F.logsigmoid(beta * delta)
