package api

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1/atollv1connect"
	"github.com/atollstore/atoll/internal/atoll"
)

// Client talks to one server's control API. Errors of its calls are of atoll's
// kinds. It may be used concurrently.
type Client struct {
	Cluster  atollv1connect.ClusterServiceClient
	Volumes  atollv1connect.VolumeServiceClient
	Versions atollv1connect.VersionServiceClient
	Names    atollv1connect.NamespaceServiceClient
	Trash    atollv1connect.TrashServiceClient
	Users    atollv1connect.UserServiceClient
	Tasks    atollv1connect.TaskServiceClient
	Demo     atollv1connect.DemoServiceClient
	http     *http.Client
	base     string
	cred     Credential
}

// RuntimeDir returns the directory for the sockets of this user's programs:
// $ATOLL_RUNTIME_DIR, /run/atoll for root, $XDG_RUNTIME_DIR/atoll, else
// /tmp/atoll-UID. It need not exist.
func RuntimeDir() string {
	if d := os.Getenv("ATOLL_RUNTIME_DIR"); d != "" {
		return d
	}
	if os.Getuid() == 0 {
		return "/run/atoll"
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "atoll")
	}
	return filepath.Join(os.TempDir(), "atoll-"+strconv.Itoa(os.Getuid()))
}

// CheckPrivate tells whether a directory is this user's (or root's) alone, so
// that what listens in it can be trusted: names under /tmp can be taken by
// anyone first.
func CheckPrivate(dir string) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("directory %s: %v: %w", dir, err, atoll.ErrNotExist)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !st.IsDir() || !ok || (sys.Uid != 0 && int(sys.Uid) != os.Getuid()) || st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("directory %s is not this user's alone; remove it, or name another with ATOLL_RUNTIME_DIR: %w", dir, atoll.ErrDenied)
	}
	return nil
}

// DefaultSocket returns where the first server of this user listens, and where
// the command line looks when nothing else is said.
func DefaultSocket() string { return filepath.Join(RuntimeDir(), "api.sock") }

// NewClient returns a client for addr: "unix:/path", "host:port" or an
// http(s) URL. The credential may be empty on a Unix socket: then it is root's.
// tlsConf is used for https.
func NewClient(addr string, cred Credential, tlsConf *tls.Config) (*Client, error) {
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	tr := &http.Transport{TLSClientConfig: tlsConf, MaxIdleConnsPerHost: 4, IdleConnTimeout: 30 * time.Second}
	base := addr
	switch path, unix := strings.CutPrefix(addr, "unix:"); {
	case unix:
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		}
		base = "http://atoll"
	case strings.HasPrefix(addr, "http://"), strings.HasPrefix(addr, "https://"):
		tr.DialContext = dialer.DialContext
	default:
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return nil, fmt.Errorf("server address %q: want unix:/path, host:port or https://host:port: %w", addr, atoll.ErrInvalid)
		}
		tr.DialContext = dialer.DialContext
		base = "http://" + addr
		if tlsConf != nil {
			base = "https://" + addr
		}
	}
	hc := &http.Client{Transport: tr}
	opts := []connect.ClientOption{connect.WithProtoJSON(), connect.WithInterceptors(clientInterceptor{cred})}
	return &Client{
		Cluster:  atollv1connect.NewClusterServiceClient(hc, base, opts...),
		Volumes:  atollv1connect.NewVolumeServiceClient(hc, base, opts...),
		Versions: atollv1connect.NewVersionServiceClient(hc, base, opts...),
		Names:    atollv1connect.NewNamespaceServiceClient(hc, base, opts...),
		Trash:    atollv1connect.NewTrashServiceClient(hc, base, opts...),
		Users:    atollv1connect.NewUserServiceClient(hc, base, opts...),
		Tasks:    atollv1connect.NewTaskServiceClient(hc, base, opts...),
		Demo:     atollv1connect.NewDemoServiceClient(hc, base, opts...),
		http:     hc, base: base, cred: cred,
	}, nil
}

// Get fetches a plain path of the server, such as /metrics, and returns the
// open response. The caller closes its body.
func (c *Client) Get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path, nil)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", path, err)
	}
	c.cred.set(req.Header)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("get %s: %v: %w", path, err, atoll.ErrUnreachable)
	}
	return resp, nil
}

// Anonymous reports whether the client shows no credential.
func (c *Client) Anonymous() bool { return c.cred == Credential{} }

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// headerForwarded marks a call that one server passes on to another.
const headerForwarded = "Atoll-Forwarded"

type forwardedKey struct{}

// Forwarding marks ctx: calls of a Client under it say that a server passes them
// on, and whoever is asked does not pass them on again.
func Forwarding(ctx context.Context) context.Context {
	return context.WithValue(ctx, forwardedKey{}, true)
}

// Forwarded reports whether the call that ctx belongs to came from another
// server.
func Forwarded(ctx context.Context) bool { return ctx.Value(forwardedKey{}) != nil }

// clientInterceptor adds the credential and gives errors their kinds back.
type clientInterceptor struct{ cred Credential }

func (i clientInterceptor) header(ctx context.Context, h http.Header) {
	i.cred.set(h)
	if Forwarded(ctx) {
		h.Set(headerForwarded, "1")
	}
}

func (i clientInterceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		i.header(ctx, req.Header())
		resp, err := next(ctx, req)
		if err != nil {
			return nil, received(ctx, err)
		}
		return resp, nil
	}
}

// received is an error of a call as its caller sees it.
func received(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return fromConnect(err)
}

func (i clientInterceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		i.header(ctx, conn.RequestHeader())
		return &clientStream{conn, ctx}
	}
}

func (i clientInterceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// clientStream is a stream of answers whose errors have their kinds.
type clientStream struct {
	connect.StreamingClientConn
	ctx context.Context // of the call, for the reason of its end
}

// Send implements connect.StreamingClientConn.
func (s *clientStream) Send(msg any) error {
	err := s.StreamingClientConn.Send(msg)
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return received(s.ctx, err)
}

// Receive implements connect.StreamingClientConn.
func (s *clientStream) Receive(msg any) error {
	err := s.StreamingClientConn.Receive(msg)
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return received(s.ctx, err)
}
