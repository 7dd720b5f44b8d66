"""A lamp that speaks MQTT, of paho: simulator.py PORT.

Says what it is on plant/lamp/state, retained, and takes orders on plant/lamp/set. On stdin: a line `TOPIC PAYLOAD` is published;
`TOPIC *LENGTH` publishes that many bytes.
"""

import json
import sys

import paho.mqtt.client as mqtt

state = {"level": 40, "on": False}


def say(client):
    client.publish("plant/lamp/state", json.dumps(state), qos=1, retain=True)


def connected(client, *_):
    client.subscribe("plant/lamp/set", qos=1)
    say(client)
    print("ready", flush=True)


def ordered(client, _, message):
    state.update(json.loads(message.payload))
    say(client)


client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
client.on_connect, client.on_message = connected, ordered
client.connect("127.0.0.1", int(sys.argv[1]))
client.loop_start()
for line in sys.stdin:
    topic, payload = line.rstrip("\n").split(" ", 1)
    payload = b"x" * int(payload[1:]) if payload.startswith("*") else payload.encode()
    client.publish(topic, payload, qos=1).wait_for_publish()
