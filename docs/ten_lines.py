import torch, lcsc_opt

x = torch.randn(3000, 32, generator=torch.manual_seed(0))
y, net, states = x.sum(1, keepdim=True) + torch.randn(3000, 1), torch.nn.Linear(32, 1), {}
loss = lambda net, items=slice(1000, 2000): torch.nn.functional.mse_loss(net(x[items]), y[items])
held_out = lambda net: loss(net, slice(2000, 3000))
for step in range(1, 41):
    net.zero_grad(), loss(net, torch.randint(1000, (16,))).backward()
    states[step] = {name: p.data.sub_(0.05 * p.grad).clone() for name, p in net.named_parameters()}
result = lcsc_opt.search(states, build=net, score=loss, held_out=held_out)
net.load_state_dict(result.merge()), print(result)
