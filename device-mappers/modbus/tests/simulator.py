"""Modbus devices of pymodbus: units 1 and 2 on TCP, or unit 1 on one end of a serial line that this makes.

simulator.py tcp PORT | simulator.py rtu LINK
LINK is made a symbolic link to the other end, so that it has one name however often this is started anew. As on any line, nobody answers
for units that are not there.
On stdin: `delay SECONDS` makes every answer wait.
"""

import asyncio
import os
import sys
import threading
import tty

from pymodbus import FramerType
from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

delay = 0.0


async def slow(*_):
    if delay:
        await asyncio.sleep(delay)
    return None


def unit(number):
    return SimDevice(
        id=number,
        simdata=(
            [SimData(0, values=[True, False, True, True, False, False, False, False], datatype=DataType.BITS)],
            [SimData(0, values=[False, True, False, False, False, False, False, False], datatype=DataType.BITS)],
            [
                SimData(0, values=[215, 0xFFFF, number], datatype=DataType.REGISTERS),
                SimData(10, values=3.5, datatype=DataType.FLOAT32),
                SimData(20, values=[0x4142, 0x4300], datatype=DataType.REGISTERS),
                SimData(100, values=[7] * 30, datatype=DataType.REGISTERS),
            ],
            [SimData(0, values=[1234], datatype=DataType.REGISTERS)],
        ),
        action=slow,
    )


def line():
    """Two pseudo terminals whose other ends are joined: what is written to one is read from the other."""
    ends = [os.openpty() for _ in range(2)]
    for pair in ends:
        for end in pair:
            tty.setraw(end)

    def copy(source, sink):
        while data := os.read(source, 1024):
            os.write(sink, data)

    (first, one), (second, two) = ends
    threading.Thread(target=copy, args=(first, second), daemon=True).start()
    threading.Thread(target=copy, args=(second, first), daemon=True).start()
    return os.ttyname(one), os.ttyname(two)


def listen_to_orders():
    global delay
    for order in sys.stdin:
        delay = float(order.split()[1])


async def main():
    threading.Thread(target=listen_to_orders, daemon=True).start()
    if sys.argv[1] == "tcp":
        server = ModbusTcpServer([unit(1), unit(2)], address=("127.0.0.1", int(sys.argv[2])))
        ready = "ready"
    else:
        ours, theirs = line()

        # It would answer for any unit, with an exception.
        def silent_for_others(sending, frame):
            return b"" if sending and frame[0] != 1 else frame

        server = ModbusSerialServer(
            [unit(1)], framer=FramerType.RTU, port=ours, baudrate=115200, trace_packet=silent_for_others
        )
        link = sys.argv[2]
        os.symlink(theirs, f"{link}.new")
        os.replace(f"{link}.new", link)
        ready = link
    task = asyncio.create_task(server.serve_forever())
    await asyncio.sleep(0.3)
    print(ready, flush=True)
    await task


asyncio.run(main())
