"""A client of devices over MQTT as apps are written: paho-mqtt, KubeEdge's topics, a device by its name alone.

Usage: client.py NODE DEVICE USER PASSWORD

Asks all that can be asked, one after the other, and prints each answer as a line of JSON. Ends with 1 when one does not come.
"""

import json
import queue
import sys

import paho.mqtt.client as mqtt

NODE, DEVICE, USER, PASSWORD = sys.argv[1:5]

REQUESTS = [
    (f"$hw/events/node/{NODE}/membership/get", {}),
    (f"$hw/events/device/{DEVICE}/state/update", {"state": "online"}),
    (f"$hw/events/device/{DEVICE}/twin/update", {"twin": {"level": {"actual": {"value": "5"}, "expected": {"value": "9"}}}}),
    (f"$hw/events/device/{DEVICE}/twin/get", {}),
]

heard = queue.Queue()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=f"{USER}-app")
client.username_pw_set(USER, PASSWORD)
client.on_subscribe = lambda *_: heard.put((None, None))
client.on_message = lambda _client, _data, message: heard.put((message.topic, message.payload))
client.connect("127.0.0.1", 1883)
client.loop_start()
client.subscribe([(f"{topic}/result", 1) for topic, _ in REQUESTS])
heard.get(timeout=5)
for number, (topic, request) in enumerate(REQUESTS):
    client.publish(topic, json.dumps({"event_id": str(number), **request}), qos=1)
    try:
        answered, payload = heard.get(timeout=5)
    except queue.Empty:
        sys.exit(f"no answer to {topic}")
    print(json.dumps({"topic": answered, "answer": json.loads(payload)}), flush=True)
client.loop_stop()
