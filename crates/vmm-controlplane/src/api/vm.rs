//! The handlers of `vmm.v1.VmService`, one method per call.

use connectrpc::{RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use vmm_core::store::VmRequest;
use vmm_host::clock::now_ms;
use vmm_proto::v1 as pb;
use vmm_service::{
    Call, CallKind, ConfigUpdate, ListQuery, Operation, ServiceError, ShutdownOptions, VmService,
};

use super::call::{call, response};
use super::convert::{
    backend_to_pb, config_from_pb, count, info_to_pb, reports_to_pb, state_to_pb, states_from_pb,
    summary_to_pb,
};
use super::error::to_connect;
use super::{console, events, size};
use crate::rpc::{record_vm_id, require_force};

/// The handlers, which call the use cases.
pub struct VmHandlers {
    service: VmService,
}

impl VmHandlers {
    /// Serves `service`.
    pub fn new(service: VmService) -> Self {
        Self { service }
    }
}

#[allow(refining_impl_trait, reason = "the handlers name the messages they answer with")]
impl pb::VmService for VmHandlers {
    async fn create_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::CreateVmRequest>,
    ) -> ServiceResult<pb::CreateVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        let request = request.to_owned_message();
        let config = config_from_pb(request.config.into_option().unwrap_or_default());
        let create = CallKind::Create(Box::new(VmRequest { backend: request.backend, config }));
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, create)).await?;
        record_vm_id(&ctx, answered.answer.vm_id.as_str());
        Ok(response(answered, |vm| pb::CreateVmResponse {
            vm_id: vm.vm_id.to_string(),
            state: state_to_pb(vm.state).into(),
            warnings: reports_to_pb(vm.warnings),
            uid: vm.uid.to_string(),
            ..Default::default()
        }))
    }

    async fn delete_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::DeleteVmRequest>,
    ) -> ServiceResult<pb::DeleteVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        require_force(&ctx, request.force)?;
        let operation = Operation::Delete { force: request.force };
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, operation)).await?;
        Ok(response(answered, |vm| pb::DeleteVmResponse {
            success: true,
            left_behind: reports_to_pb(vm.left_behind),
            ..Default::default()
        }))
    }

    async fn boot_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::BootVmRequest>,
    ) -> ServiceResult<pb::BootVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        let operation = Operation::Boot;
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, operation)).await?;
        Ok(response(answered, |vm| pb::BootVmResponse {
            success: true,
            state: state_to_pb(vm.state).into(),
            ..Default::default()
        }))
    }

    async fn shutdown_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::ShutdownVmRequest>,
    ) -> ServiceResult<pb::ShutdownVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        require_force(&ctx, request.force)?;
        let options = ShutdownOptions { force: request.force, timeout_seconds: request.timeout_seconds };
        let operation = Operation::Shutdown(options);
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, operation)).await?;
        Ok(response(answered, |vm| pb::ShutdownVmResponse {
            success: true,
            state: state_to_pb(vm.state).into(),
            ended_by: vm.ended_by.map(|rung| rung.as_str().to_owned()).unwrap_or_default(),
            ..Default::default()
        }))
    }

    async fn pause_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::PauseVmRequest>,
    ) -> ServiceResult<pb::PauseVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        let operation = Operation::Pause;
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, operation)).await?;
        Ok(response(answered, |vm| pb::PauseVmResponse {
            success: true,
            state: state_to_pb(vm.state).into(),
            ..Default::default()
        }))
    }

    async fn resume_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::ResumeVmRequest>,
    ) -> ServiceResult<pb::ResumeVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        let operation = Operation::Resume;
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, operation)).await?;
        Ok(response(answered, |vm| pb::ResumeVmResponse {
            success: true,
            state: state_to_pb(vm.state).into(),
            ..Default::default()
        }))
    }

    async fn reboot_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::RebootVmRequest>,
    ) -> ServiceResult<pb::RebootVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        let options = ShutdownOptions { force: request.force, timeout_seconds: request.timeout_seconds };
        let operation = Operation::Reboot(options);
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, operation)).await?;
        Ok(response(answered, |vm| pb::RebootVmResponse {
            success: true,
            state: state_to_pb(vm.state).into(),
            ended_by: vm.ended_by.map(|rung| rung.as_str().to_owned()).unwrap_or_default(),
            ..Default::default()
        }))
    }

    async fn update_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::UpdateVmRequest>,
    ) -> ServiceResult<pb::UpdateVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        let request = request.to_owned_message();
        let operation = Operation::Update(Box::new(ConfigUpdate {
            config: config_from_pb(request.config.into_option().unwrap_or_default()),
            fields: request.fields,
            if_generation: request.if_generation,
        }));
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, operation)).await?;
        Ok(response(answered, |vm| pb::UpdateVmResponse {
            state: state_to_pb(vm.state).into(),
            generation: count(vm.generation),
            warnings: reports_to_pb(vm.warnings),
            ..Default::default()
        }))
    }

    async fn get_vm_info(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::GetVmInfoRequest>,
    ) -> ServiceResult<pb::GetVmInfoResponse> {
        record_vm_id(&ctx, request.vm_id);
        let view = self.service.get(request.vm_id).map_err(to_connect)?;
        let kernel_args = self.service.kernel_args(&view.record);
        Response::ok(info_to_pb(&view, kernel_args, now_ms()))
    }

    async fn list_vms(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::ListVmsRequest>,
    ) -> ServiceResult<pb::ListVmsResponse> {
        let request = request.to_owned_message();
        let states = states_from_pb("state_filter", &request.state_filter);
        let (states, mut violations) = match states {
            Ok(states) => (states, Vec::new()),
            Err(violations) => (Vec::new(), violations),
        };
        let mut query = ListQuery {
            states,
            metadata: request.metadata_filter,
            backend: request.backend,
            page_size: request.page_size,
            // A token belongs to a filter, so it cannot be checked without a valid filter.
            page_token: if violations.is_empty() { request.page_token } else { String::new() },
        };
        let page = self.service.list(&query);
        if !violations.is_empty() {
            // All other violations are reported together with those of the states.
            if let Err(ServiceError::Invalid(more)) = page {
                violations.extend(more);
            }
            return Err(to_connect(ServiceError::Invalid(violations)));
        }
        let mut page = page.map_err(to_connect)?;
        let mut vms: Vec<_> = page.vms.iter().map(|record| summary_to_pb(record)).collect();
        while let fitting = size::fitting(&vms)
            && fitting < vms.len()
        {
            // The page shrinks with each turn, and one entry always fits, so the loop ends.
            query.page_size = i32::try_from(fitting).unwrap_or(1);
            page = self.service.list(&query).map_err(to_connect)?;
            vms = page.vms.iter().map(|record| summary_to_pb(record)).collect();
        }
        Response::ok(pb::ListVmsResponse {
            vms,
            next_page_token: page.next_page_token,
            total_count: i32::try_from(page.total_count).unwrap_or(i32::MAX),
            ..Default::default()
        })
    }

    async fn validate_vm(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::ValidateVmRequest>,
    ) -> ServiceResult<pb::ValidateVmResponse> {
        let request = request.to_owned_message();
        let config = config_from_pb(request.config.into_option().unwrap_or_default());
        let requested = VmRequest { backend: request.backend, config };
        let report = self.service.validate(&requested).await.map_err(to_connect)?;
        Response::ok(pb::ValidateVmResponse {
            ok: report.is_ok(),
            warnings: reports_to_pb(report.warnings.clone()),
            violations: reports_to_pb(report.into_violations()),
            ..Default::default()
        })
    }

    async fn list_backends(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::ListBackendsRequest>,
    ) -> ServiceResult<pb::ListBackendsResponse> {
        let backends = self.service.backends().statuses().into_iter().map(backend_to_pb).collect();
        Response::ok(pb::ListBackendsResponse { backends, ..Default::default() })
    }

    async fn wait_vm(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::WaitVmRequest>,
    ) -> ServiceResult<pb::WaitVmResponse> {
        record_vm_id(&ctx, request.vm_id);
        Response::ok(events::wait(&self.service, &ctx, request.to_owned_message()).await?)
    }

    async fn watch_vms(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::WatchVmsRequest>,
    ) -> ServiceResult<ServiceStream<pb::VmEvent>> {
        record_vm_id(&ctx, request.vm_id);
        Response::stream_ok(events::watch(&self.service, request.to_owned_message()).await?)
    }

    async fn list_vm_events(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::ListVmEventsRequest>,
    ) -> ServiceResult<pb::ListVmEventsResponse> {
        record_vm_id(&ctx, request.vm_id);
        Response::ok(events::list(&self.service, request.to_owned_message()).await?)
    }

    async fn stream_console(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::StreamConsoleRequest>,
    ) -> ServiceResult<ServiceStream<pb::StreamConsoleResponse>> {
        record_vm_id(&ctx, request.vm_id);
        Response::stream_ok(console::stream(&self.service, request.to_owned_message()).await?)
    }

    async fn write_console(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::WriteConsoleRequest>,
    ) -> ServiceResult<pb::WriteConsoleResponse> {
        record_vm_id(&ctx, request.vm_id);
        let input = CallKind::WriteConsole(request.data.into());
        let answered = call(&self.service, &ctx, Call::new(request.vm_id, input)).await?;
        Ok(response(answered, |_| pb::WriteConsoleResponse::default()))
    }
}
