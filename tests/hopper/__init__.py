"""A Hopper made of threads and tensors: runs flash_v3's Gluon kernels on the CPU, statement by statement, and watches them.

Gluon has no interpreter. This one takes the kernels' own Python functions and gives them other meanings for Gluon's words:

    values.py    what registers hold: a tensor, or a number with C's division
    machine.py   warpgroups as threads of which one runs at a time, in an order drawn by a seed; barriers; a clock for each thread
    memory.py    shared memory and what TMA reaches
    words.py     Gluon's words, and the inline PTX that flash_v3 uses
    run.py       a kernel with these words, to be launched as the real one is

What a GPU does later may happen late here: a product is made when it is awaited, and where TMA is to bring a tile lies NaN until
somebody waits for it or chance has it come. Every access to shared memory is compared with those before it by vector clocks
(Fidge 1988; Mattern 1989), and so is every arrival at a barrier with the round before: a race is found though the order at hand
hides it. A barrier that nobody comes to, a load, a product or a store that nobody awaits, what the tensor cores may not see yet:
all end in a `HardwareFault`.

A warpgroup is one thread here, since Triton sees to its 128: it puts `bar.sync` before what one of them does for all, and after
what one of them waits for. Layouts, registers (also those that a product still reads) and speed are the compiler's, and a GPU's to
show. Global memory is compared only where sums must come in order.
"""
