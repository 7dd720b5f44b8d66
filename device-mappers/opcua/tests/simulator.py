"""An OPC UA server of asyncua: simulator.py PORT. Users: anyone, or operator with the password secret.

On stdin: `set VALUE` sets the temperature.
"""

import asyncio
import logging
import sys
import threading

from asyncua import Server, ua, uamethod
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.server.user_managers import UserManager

logging.disable(logging.CRITICAL)


class Users(UserManager):
    def get_user(self, iserver, username=None, password=None, certificate=None):
        if username is None or (username, password) == ("operator", "secret"):
            return User(role=UserRole.Admin)
        return None


@uamethod
def add(parent, one, two):
    return one + two


async def main():
    server = Server(user_manager=Users())
    await server.init()
    server.set_endpoint(f"opc.tcp://127.0.0.1:{sys.argv[1]}/")
    server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
    index = await server.register_namespace("urn:plant")
    plant = await server.nodes.objects.add_object(ua.NodeId("plant", index), "plant")

    async def variable(name, value, kind):
        node = await plant.add_variable(ua.NodeId(name, index), name, ua.Variant(value, kind))
        await node.set_writable()
        return node

    temperature = await variable("temperature", 21.5, ua.VariantType.Double)
    await variable("count", 7, ua.VariantType.UInt16)
    await variable("on", True, ua.VariantType.Boolean)
    await variable("label", "pump", ua.VariantType.String)
    await variable("big", "x" * (10 << 20), ua.VariantType.String)
    numbers = [ua.VariantType.Int64, ua.VariantType.Int64]
    await plant.add_method(ua.NodeId("add", index), "add", add, numbers, [ua.VariantType.Int64])
    loop = asyncio.get_running_loop()

    def listen_to_orders():
        for order in sys.stdin:
            value = ua.Variant(float(order.split()[1]), ua.VariantType.Double)
            asyncio.run_coroutine_threadsafe(temperature.write_value(value), loop)

    async with server:
        threading.Thread(target=listen_to_orders, daemon=True).start()
        print("ready", index, flush=True)
        await asyncio.Event().wait()


asyncio.run(main())
