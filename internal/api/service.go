package api

import (
	"context"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// clusterService, volumeService and demoService unpack requests for a Backend.
type (
	clusterService struct{ b Backend }
	volumeService  struct{ b Backend }
	demoService    struct{ b DemoBackend }
)

func (s clusterService) GetStatus(ctx context.Context, _ *connect.Request[atollv1.GetStatusRequest]) (*connect.Response[atollv1.GetStatusResponse], error) {
	return reply(s.b.Status(ctx))
}

func (s clusterService) ListNodes(ctx context.Context, _ *connect.Request[atollv1.ListNodesRequest]) (*connect.Response[atollv1.ListNodesResponse], error) {
	nodes, err := s.b.Nodes(ctx)
	return reply(&atollv1.ListNodesResponse{Nodes: nodes}, err)
}

func (s clusterService) SetNode(ctx context.Context, r *connect.Request[atollv1.SetNodeRequest]) (*connect.Response[atollv1.Node], error) {
	return reply(s.b.SetNode(ctx, r.Msg))
}

func (s clusterService) GetConfig(ctx context.Context, _ *connect.Request[atollv1.GetConfigRequest]) (*connect.Response[atollv1.GetConfigResponse], error) {
	settings, err := s.b.Config(ctx)
	return reply(&atollv1.GetConfigResponse{Settings: settings}, err)
}

func (s clusterService) Diagnose(ctx context.Context, _ *connect.Request[atollv1.DiagnoseRequest]) (*connect.Response[atollv1.DiagnoseResponse], error) {
	findings, err := s.b.Diagnose(ctx)
	return reply(&atollv1.DiagnoseResponse{Findings: findings}, err)
}

func (s clusterService) CreateToken(ctx context.Context, r *connect.Request[atollv1.CreateTokenRequest]) (*connect.Response[atollv1.CreateTokenResponse], error) {
	token, expires, err := s.b.CreateToken(ctx, r.Msg.Ttl.AsDuration())
	return reply(&atollv1.CreateTokenResponse{Token: token, Expires: timestamppb.New(expires)}, err)
}

func (s clusterService) Join(ctx context.Context, r *connect.Request[atollv1.JoinRequest]) (*connect.Response[atollv1.JoinResponse], error) {
	return reply(s.b.Join(ctx, r.Msg))
}

func (s volumeService) CreateVolume(ctx context.Context, r *connect.Request[atollv1.CreateVolumeRequest]) (*connect.Response[atollv1.Volume], error) {
	return reply(s.b.CreateVolume(ctx, r.Msg))
}

func (s volumeService) ListVolumes(ctx context.Context, r *connect.Request[atollv1.ListVolumesRequest]) (*connect.Response[atollv1.ListVolumesResponse], error) {
	limit := int(r.Msg.Limit)
	if limit <= 0 || limit > 1000 {
		limit = 1000
	}
	vols, err := s.b.Volumes(ctx, r.Msg.After, limit)
	resp := &atollv1.ListVolumesResponse{Volumes: vols}
	if len(vols) == limit {
		resp.Next = vols[limit-1].Name
	}
	return reply(resp, err)
}

func (s volumeService) GetVolume(ctx context.Context, r *connect.Request[atollv1.GetVolumeRequest]) (*connect.Response[atollv1.Volume], error) {
	return reply(s.b.Volume(ctx, r.Msg.Name, r.Msg.Open))
}

func (s volumeService) ResizeVolume(ctx context.Context, r *connect.Request[atollv1.ResizeVolumeRequest]) (*connect.Response[atollv1.Volume], error) {
	return reply(s.b.ResizeVolume(ctx, r.Msg.Name, r.Msg.SizeBytes, r.Msg.Shrink))
}

func (s volumeService) SetRedundancy(ctx context.Context, r *connect.Request[atollv1.SetRedundancyRequest]) (*connect.Response[atollv1.Volume], error) {
	return reply(s.b.SetRedundancy(ctx, r.Msg))
}

func (s volumeService) DeleteVolume(ctx context.Context, r *connect.Request[atollv1.DeleteVolumeRequest]) (*connect.Response[atollv1.DeleteVolumeResponse], error) {
	return reply(s.b.DeleteVolume(ctx, r.Msg))
}

func (s volumeService) CheckVolume(ctx context.Context, r *connect.Request[atollv1.CheckVolumeRequest]) (*connect.Response[atollv1.CheckVolumeResponse], error) {
	return reply(s.b.CheckVolume(ctx, r.Msg))
}

func (s demoService) Inject(ctx context.Context, r *connect.Request[atollv1.InjectRequest]) (*connect.Response[atollv1.InjectResponse], error) {
	text, err := s.b.Inject(ctx, atoll.NodeID(r.Msg.Node), r.Msg.Fault, r.Msg.Delay.AsDuration())
	return reply(&atollv1.InjectResponse{Message: text}, err)
}

func (s demoService) AddNode(ctx context.Context, _ *connect.Request[atollv1.AddNodeRequest]) (*connect.Response[atollv1.AddNodeResponse], error) {
	node, path, err := s.b.AddNode(ctx)
	return reply(&atollv1.AddNodeResponse{Node: uint32(node), Path: path}, err)
}
