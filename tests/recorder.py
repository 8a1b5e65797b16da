"""A recorder of steps that needs no device."""


class Noted:
    """A recorder that notes what it is asked for; its replay is the step once more, into the
    recording's results.
    """

    def __init__(self):
        self.log = []

    def place(self, tensors):
        return "here"

    def record(self, step, place):
        self.log.append("record")
        results = step()

        def replay():
            self.log.append("replay")
            for mine, new in zip(results, step(), strict=True):
                if mine is not None:
                    mine.copy_(new)

        return replay, results
