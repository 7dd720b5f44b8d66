//! What edgecore calls: devices and models that come, change and go, and methods.

use std::sync::Arc;

use skerry_proto::dmi;
use skerry_proto::dmi::device_mapper_service_server::DeviceMapperService;
use skerry_proto::dmi::extensions::device_method_service_server::DeviceMethodService;
use skerry_proto::dmi::extensions::{CallRequest, CallResponse};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use crate::device::key;
use crate::directory::{Change, Directory};
use crate::driver::Driver;
use crate::worker::{Call, CallError, Done};

pub(crate) struct Service<D: Driver>(pub(crate) Arc<Directory<D>>);

type Answer<T> = Result<Response<T>, Status>;

impl<D: Driver> Service<D> {
    fn put(&self, device: Option<dmi::Device>) -> Result<(String, String), Status> {
        let device = device.ok_or_else(|| Status::invalid_argument("there is no device in the request"))?;
        let names = (device.name.clone(), device.namespace.clone());
        self.0.apply(Change::Device(Box::new(device)));
        Ok(names)
    }

    fn put_model(&self, model: Option<dmi::DeviceModel>) -> Result<(String, String), Status> {
        let model = model.ok_or_else(|| Status::invalid_argument("there is no model in the request"))?;
        let names = (model.name.clone(), model.namespace.clone());
        self.0.apply(Change::Model(Box::new(model)));
        Ok(names)
    }
}

#[tonic::async_trait]
impl<D: Driver> DeviceMapperService for Service<D> {
    async fn register_device(
        &self,
        request: Request<dmi::RegisterDeviceRequest>,
    ) -> Answer<dmi::RegisterDeviceResponse> {
        let (device_name, device_namespace) = self.put(request.into_inner().device)?;
        Ok(Response::new(dmi::RegisterDeviceResponse { device_name, device_namespace }))
    }

    async fn remove_device(&self, request: Request<dmi::RemoveDeviceRequest>) -> Answer<dmi::RemoveDeviceResponse> {
        let request = request.into_inner();
        self.0.apply(Change::DeviceGone(key(&request.device_namespace, &request.device_name)));
        Ok(Response::new(dmi::RemoveDeviceResponse {}))
    }

    async fn update_device(&self, request: Request<dmi::UpdateDeviceRequest>) -> Answer<dmi::UpdateDeviceResponse> {
        self.put(request.into_inner().device)?;
        Ok(Response::new(dmi::UpdateDeviceResponse {}))
    }

    async fn create_device_model(
        &self,
        request: Request<dmi::CreateDeviceModelRequest>,
    ) -> Answer<dmi::CreateDeviceModelResponse> {
        let (device_model_name, device_model_namespace) = self.put_model(request.into_inner().model)?;
        Ok(Response::new(dmi::CreateDeviceModelResponse { device_model_name, device_model_namespace }))
    }

    async fn remove_device_model(
        &self,
        request: Request<dmi::RemoveDeviceModelRequest>,
    ) -> Answer<dmi::RemoveDeviceModelResponse> {
        let request = request.into_inner();
        self.0.apply(Change::ModelGone(key(&request.model_namespace, &request.model_name)));
        Ok(Response::new(dmi::RemoveDeviceModelResponse {}))
    }

    async fn update_device_model(
        &self,
        request: Request<dmi::UpdateDeviceModelRequest>,
    ) -> Answer<dmi::UpdateDeviceModelResponse> {
        self.put_model(request.into_inner().model)?;
        Ok(Response::new(dmi::UpdateDeviceModelResponse {}))
    }

    async fn get_device(&self, request: Request<dmi::GetDeviceRequest>) -> Answer<dmi::GetDeviceResponse> {
        let request = request.into_inner();
        let name = key(&request.device_namespace, &request.device_name);
        let device =
            self.0.device(&name).ok_or_else(|| Status::not_found(format!("this mapper has no device {name}")))?;
        Ok(Response::new(dmi::GetDeviceResponse { device: Some(device) }))
    }
}

#[tonic::async_trait]
impl<D: Driver> DeviceMethodService for Service<D> {
    async fn call(&self, request: Request<CallRequest>) -> Answer<CallResponse> {
        let request = request.into_inner();
        let calls = self.0.calls(&key(&request.device_namespace, &request.device_name)).map_err(Status::not_found)?;
        let (reply, outcome) = oneshot::channel();
        let call = Call { method: request.method, arguments: request.arguments.into_iter().collect(), reply };
        calls
            .try_send(Box::new(call))
            .map_err(|_| Status::resource_exhausted("other calls of this device wait already"))?;
        match outcome.await {
            Ok(Ok(Done { results, written })) => {
                Ok(Response::new(CallResponse { results: results.into_iter().collect(), written }))
            }
            Ok(Err(CallError::Unknown(why))) => Err(Status::unimplemented(why)),
            Ok(Err(CallError::Argument(why))) => Err(Status::invalid_argument(why)),
            Ok(Err(CallError::Offline(why))) => {
                Err(Status::unavailable(format!("the device cannot be reached: {why}")))
            }
            Ok(Err(CallError::Refused(why))) => Err(Status::failed_precondition(why)),
            Err(_) => Err(Status::aborted("the device was removed, or its connection broke, before the method ended")),
        }
    }
}
