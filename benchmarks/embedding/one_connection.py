def run(bench, chosen, args, folder):
    raise NotImplementedError
