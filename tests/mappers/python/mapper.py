"""A device mapper as others write one: Python's grpcio with everything at its default, from the interface's file alone.

Usage: mapper.py PROTO_DIR DMI_SOCKET OWN_SOCKET PROTOCOL

Its devices are thermostats: each has the temperature that it was told to have, or 20. It registers until it is answered, reports every
200 ms what is read and what was written, and prints a line of JSON for each call that it gets and for what came of its own.
"""

import json
import sys
import tempfile
import threading
import time
from concurrent import futures

import grpc
from google.protobuf import wrappers_pb2
from grpc_tools import protoc

PROTO_DIR, DMI_SOCKET, OWN_SOCKET, PROTOCOL = sys.argv[1:5]

generated = tempfile.mkdtemp()
include = protoc.__file__.rsplit("/", 1)[0] + "/_proto"
arguments = ["protoc", f"-I{PROTO_DIR}", f"-I{include}", f"--python_out={generated}", f"--grpc_python_out={generated}", "dmi.proto"]
if protoc.main(arguments) != 0:
    sys.exit("the interface's file does not compile")
sys.path.insert(0, generated)
import dmi_pb2  # noqa: E402
import dmi_pb2_grpc  # noqa: E402

devices = {}
lock = threading.Lock()


def say(**what):
    print(json.dumps(what), flush=True)


def config(value):
    """What a CustomizedValue holds, by the wrappers that mappers of KubeEdge's framework know."""
    known = [wrappers_pb2.Int64Value, wrappers_pb2.FloatValue, wrappers_pb2.StringValue, wrappers_pb2.BoolValue]
    out = {}
    for key, packed in value.data.items():
        for kind in known:
            message = kind()
            if packed.Unpack(message):
                out[key] = message.value
    return out


def take(call, device):
    desired = {of.name: of.desired.value for of in device.spec.properties if of.desired.value}
    with lock:
        devices[(device.namespace, device.name)] = device
    visitors = {of.name: config(of.visitors.configData) for of in device.spec.properties}
    say(call=call, device=device.name, desired=desired, protocol=config(device.spec.protocol.configData), visitors=visitors)


class Mapper(dmi_pb2_grpc.DeviceMapperServiceServicer):
    def RegisterDevice(self, request, context):
        take("register", request.device)
        return dmi_pb2.RegisterDeviceResponse(deviceName=request.device.name, deviceNamespace=request.device.namespace)

    def UpdateDevice(self, request, context):
        if (request.device.namespace, request.device.name) not in devices:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such device")
        take("update", request.device)
        return dmi_pb2.UpdateDeviceResponse()

    def RemoveDevice(self, request, context):
        with lock:
            devices.pop((request.deviceNamespace, request.deviceName), None)
        say(call="remove", device=request.deviceName)
        return dmi_pb2.RemoveDeviceResponse()

    def CreateDeviceModel(self, request, context):
        say(call="model", model=request.model.name, properties=[of.name for of in request.model.spec.properties])
        return dmi_pb2.CreateDeviceModelResponse(deviceModelName=request.model.name)

    def UpdateDeviceModel(self, request, context):
        say(call="model", model=request.model.name, properties=[of.name for of in request.model.spec.properties])
        return dmi_pb2.UpdateDeviceModelResponse()

    def RemoveDeviceModel(self, request, context):
        return dmi_pb2.RemoveDeviceModelResponse()


server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
dmi_pb2_grpc.add_DeviceMapperServiceServicer_to_server(Mapper(), server)
server.add_insecure_port(f"unix:{OWN_SOCKET}")
server.start()

# The authority is whatever the library makes of the path.
manager = dmi_pb2_grpc.DeviceManagerServiceStub(grpc.insecure_channel(f"unix:{DMI_SOCKET}"))
info = dmi_pb2.MapperInfo(name="python", version="1", api_version="v1beta1", protocol=PROTOCOL, address=OWN_SOCKET.encode(), state="ok")
while True:
    try:
        answer = manager.MapperRegister(dmi_pb2.MapperRegisterRequest(withData=True, mapper=info), timeout=5)
        break
    except grpc.RpcError as error:
        say(failed="register", code=error.code().name)
        time.sleep(0.5)
say(registered=PROTOCOL, models=[model.name for model in answer.modelList], devices=[device.name for device in answer.deviceList])
for device in answer.deviceList:
    take("answer", device)

while True:
    with lock:
        held = list(devices.values())
    for device in held:
        twins = []
        for of in device.spec.properties:
            stamp = {"timestamp": str(int(time.time() * 1000)), "type": "string"}
            value = of.desired.value or "20"
            twin = dmi_pb2.Twin(propertyName=of.name, reported=dmi_pb2.TwinProperty(value=value, metadata=stamp))
            twin.observedDesired.value = of.desired.value
            twins.append(twin)
        try:
            status = dmi_pb2.DeviceStatus(twins=twins)
            of = {"deviceName": device.name, "deviceNamespace": device.namespace}
            manager.ReportDeviceStatus(dmi_pb2.ReportDeviceStatusRequest(reportedDevice=status, **of), timeout=5)
            manager.ReportDeviceStates(dmi_pb2.ReportDeviceStatesRequest(state="online", **of), timeout=5)
        except grpc.RpcError as error:
            say(failed="report", code=error.code().name, device=device.name, why=error.details())
    time.sleep(0.2)
