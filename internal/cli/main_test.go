package cli

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeServer is a server's API without a server.
type fakeServer struct {
	api.Backend // what is not needed panics
	volumes     []*atollv1.Volume
	check       *atollv1.CheckVolumeResponse
	wait        chan struct{} // holds answers back
}

func (f *fakeServer) Healthy() error { return nil }

func (f *fakeServer) Volumes(ctx context.Context, _ string, _ int) ([]*atollv1.Volume, error) {
	if f.wait != nil {
		select {
		case <-f.wait:
		case <-ctx.Done():
		}
	}
	return f.volumes, nil
}

func (f *fakeServer) Volume(_ context.Context, name string, _ bool) (*atollv1.Volume, error) {
	for _, v := range f.volumes {
		if v.Name == name {
			return v, nil
		}
	}
	return nil, fmt.Errorf("volume %q: %w", name, atoll.ErrNotExist)
}

func (f *fakeServer) CreateVolume(_ context.Context, r *atollv1.CreateVolumeRequest) (*atollv1.Volume, error) {
	return &atollv1.Volume{Name: r.Name, SizeBytes: r.SizeBytes, Replicas: max(1, r.Replicas), Urls: []string{"nbd+unix:///" + r.Name + "?socket=/x/nbd.sock"}}, nil
}

func (f *fakeServer) DeleteVolume(ctx context.Context, r *atollv1.DeleteVolumeRequest) (*atollv1.DeleteVolumeResponse, error) {
	if _, err := f.Volume(ctx, r.Name, false); err != nil {
		return nil, err
	}
	return &atollv1.DeleteVolumeResponse{Bytes: 5 << 20}, nil
}

func (f *fakeServer) CheckVolume(context.Context, *atollv1.CheckVolumeRequest) (*atollv1.CheckVolumeResponse, error) {
	return f.check, nil
}

func (f *fakeServer) SetNode(_ context.Context, r *atollv1.SetNodeRequest) (*atollv1.Node, error) {
	return &atollv1.Node{Id: r.Id, State: r.State, Heir: r.Heir}, nil
}

func (f *fakeServer) Nodes(context.Context) ([]*atollv1.Node, error) {
	return []*atollv1.Node{
		{Id: 2, Condition: "down", Address: "10.0.0.2:7401", TotalBytes: 1 << 40, FreeBytes: 1 << 39, Segments: 12345, Errors: 77},
		{Id: 1, Up: true, Condition: "read-only", Path: "/mnt/a", TotalBytes: 1 << 40, FreeBytes: 1 << 40, AppendP99: durationpb.New(1234567 * time.Nanosecond)},
	}, nil
}

func (f *fakeServer) Status(context.Context) (*atollv1.GetStatusResponse, error) {
	return &atollv1.GetStatusResponse{
		ClusterId: strings.Repeat("ab", 16), Health: "degraded", Reasons: []string{"node 2 (b) is down"}, Version: "v1", NodesUp: 1, NodesTotal: 2, Volumes: 1,
		RawTotalBytes: 30 << 30, RawFreeBytes: 15 << 30, UsableTotalBytes: 10 << 30, UsableFreeBytes: 5 << 30,
		Processes: []*atollv1.Process{{Host: "host-a", Pid: 4711, Roles: []string{"controller", "node", "gateway"}, Api: "127.0.0.1:7400", Nbd: "127.0.0.1:10809", Started: timestamppb.Now(), Answering: true}},
		Now:       timestamppb.Now(),
	}, nil
}

func (f *fakeServer) Config(context.Context) ([]*atollv1.Setting, error) {
	return []*atollv1.Setting{{Key: "memory", Value: "1G", Origin: "default"}}, nil
}

// serveFake serves f on a Unix socket, which it makes the default server.
func serveFake(t *testing.T, f api.Backend) {
	t.Helper()
	dir, err := os.MkdirTemp("", "cli-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	_, unix := api.NewHandlers(api.Options{Backend: f})
	l, err := net.Listen("unix", filepath.Join(dir, "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: unix}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	t.Setenv("ATOLL_SERVER", "unix:"+filepath.Join(dir, "api.sock"))
}

// run runs a command line and returns its exit code and what it printed.
func run(t *testing.T, args ...string) (code int, out, err string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	app := &App{In: strings.NewReader(""), Out: &stdout, Err: &stderr}
	code = Run(t.Context(), app, New(app, "test"), args)
	return code, stdout.String(), stderr.String()
}
