package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// fakeBackend answers the calls that the tests make.
type fakeBackend struct {
	Backend // what is not needed panics
	forward bool
}

func (f *fakeBackend) Healthy() error { return nil }

func (f *fakeBackend) GetEntry(ctx context.Context, r *atollv1.GetEntryRequest) (*atollv1.Entry, error) {
	f.forward = Forwarded(ctx)
	return &atollv1.Entry{Path: r.Path}, nil
}

func (f *fakeBackend) Diff(ctx context.Context, r *atollv1.DiffRequest, send func(*atollv1.DiffResponse) error) error {
	for i := range 3 {
		if err := send(&atollv1.DiffResponse{Extents: []*atollv1.Extent{{Offset: int64(i)}}}); err != nil {
			return err
		}
	}
	if r.From == "bad" {
		return WithHint(fmt.Errorf("difference of %q: %w", r.Name, atoll.ErrConflict), "do something else")
	}
	return nil
}

func serve(t *testing.T, o Options) (tcp, unix *httptest.Server, c *Client) {
	t.Helper()
	a, b := NewHandlers(o)
	tcp, unix = httptest.NewServer(a), httptest.NewServer(b)
	t.Cleanup(tcp.Close)
	t.Cleanup(unix.Close)
	c, err := NewClient(tcp.URL, Credential{Token: o.Token}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return tcp, unix, c
}

// A stream's answers arrive in order, and its error with kind and hint.
func TestStream(t *testing.T) {
	_, _, c := serve(t, Options{Backend: &fakeBackend{}, Token: "secret"})
	for from, want := range map[string]error{"": nil, "bad": atoll.ErrConflict} {
		in, err := c.Versions.Diff(t.Context(), connect.NewRequest(&atollv1.DiffRequest{Name: "x", From: from}))
		if err != nil {
			t.Fatal(err)
		}
		n := int64(0)
		for in.Receive() {
			if in.Msg().Extents[0].Offset != n {
				t.Errorf("answer %d is %v", n, in.Msg())
			}
			n++
		}
		if err := in.Err(); n != 3 || !errors.Is(err, want) || want != nil && Hint(err) != "do something else" {
			t.Errorf("from %q: %d answers, %v (%s)", from, n, err, Hint(err))
		}
		if err := in.Close(); err != nil {
			t.Error(err)
		}
	}
	stranger, err := NewClient(c.base, Credential{Token: "wrong"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	in, err := stranger.Versions.Diff(t.Context(), connect.NewRequest(&atollv1.DiffRequest{}))
	if err == nil {
		in.Receive()
		err = errors.Join(in.Err(), in.Close())
	}
	if !errors.Is(err, atoll.ErrDenied) {
		t.Errorf("a stranger's stream: %v", err)
	}
}

// A call says whether another server passed it on, and when it was surely not
// made.
func TestForwarding(t *testing.T) {
	b := &fakeBackend{}
	tcp, _, c := serve(t, Options{Backend: b, Token: "secret"})
	for _, want := range []bool{false, true} {
		ctx := t.Context()
		if want {
			ctx = Forwarding(ctx)
		}
		if _, err := c.Names.GetEntry(ctx, connect.NewRequest(&atollv1.GetEntryRequest{Path: "a"})); err != nil || b.forward != want {
			t.Errorf("passed on %v, seen as %v, %v", want, b.forward, err)
		}
	}
	tcp.Close()
	c.Close() // a connection that is just being closed would tell less
	_, err := c.Names.GetEntry(t.Context(), connect.NewRequest(&atollv1.GetEntryRequest{}))
	if !errors.Is(err, atoll.ErrUnreachable) || !Unsent(err) {
		t.Errorf("nobody listens: %v", err)
	}
	if Unsent(fmt.Errorf("x: %w", atoll.ErrUnreachable)) {
		t.Error("any error counts as not sent")
	}
}

// What is mounted needs no token, keeps to its door, and is not for pages of
// other sites, by whatever method or name.
func TestMounts(t *testing.T) {
	say := func(text string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })
	}
	tcp, unix, _ := serve(t, Options{Backend: &fakeBackend{}, Token: "secret", Mounts: []Mount{
		{Path: "/door/", TCP: say("tcp"), Unix: say("unix")}, {Path: "/inner", Unix: say("inner")},
	}})
	get := func(base, path string, change func(*http.Request)) string {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(r)
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(resp.StatusCode, " ", string(body))
	}
	header := func(key, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(key, value) }
	}
	host := func(name string) func(*http.Request) { return func(r *http.Request) { r.Host = name } }
	_, port, err := net.SplitHostPort(strings.TrimPrefix(tcp.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []struct {
		base, path string
		change     func(*http.Request)
		want       string
	}{
		{tcp.URL, "/door/x", nil, "200 tcp"},
		{unix.URL, "/door/x", nil, "200 unix"},
		{unix.URL, "/inner", nil, "200 inner"},
		{tcp.URL, "/inner", nil, "401"},
		{tcp.URL, "/healthz", nil, "200 ok"},
		{tcp.URL, "/door/x", header("Sec-Fetch-Site", "cross-site"), "403"},
		{tcp.URL, "/door/x", header("Sec-Fetch-Site", "same-site"), "403"},
		{tcp.URL, "/door/x", header("Sec-Fetch-Site", "none"), "200 tcp"},
		{tcp.URL, "/door/x", header("Origin", "http://evil.example"), "403"},
		{tcp.URL, "/door/x", host("evil.example:" + port), "403"},
		{tcp.URL, "/door/x", host("localhost:" + port), "200 tcp"},
		{tcp.URL, "/door/x", host("[::1]:" + port), "200 tcp"},
	} {
		if got := get(w.base, w.path, w.change); !strings.HasPrefix(got, w.want) {
			t.Errorf("%s%s: %s, want %s", w.base, w.path, got, w.want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// loginBackend knows bob, who is not root.
type loginBackend struct{ fakeBackend }

func (*loginBackend) Login(_ context.Context, name, password string) (Caller, error) {
	if name == "bob" && password == "b" {
		return Caller{Name: name}, nil
	}
	return Caller{}, atoll.ErrDenied
}

func (*loginBackend) Authorize(_ context.Context, who Caller, request any) error {
	if r, ok := request.(*atollv1.GetEntryRequest); ok && r.Path == "his" && who.Name == "bob" {
		return nil
	}
	return fmt.Errorf("not %s's: %w", who.Name, atoll.ErrDenied)
}

func (*loginBackend) Conceal(_ context.Context, _ Caller, response any) error {
	response.(*atollv1.Entry).Owner = "seen"
	return nil
}

// Every call is put before the rights, but root's; and profiles are root's.
func TestCallers(t *testing.T) {
	tcp, unix, root := serve(t, Options{Backend: &loginBackend{}, Token: "secret"})
	as := func(base string, cred Credential) *Client {
		c, err := NewClient(base, cred, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	bob := Credential{User: "bob", Password: "b"}
	for _, w := range []struct {
		c        *Client
		path     string
		want     error
		profiles int
	}{
		{root, "other", nil, 200}, {as(unix.URL, Credential{}), "other", nil, 200},
		{as(tcp.URL, bob), "his", nil, 403}, {as(unix.URL, bob), "his", nil, 403},
		{as(tcp.URL, bob), "other", atoll.ErrDenied, 403}, {as(unix.URL, bob), "other", atoll.ErrDenied, 403},
		{as(tcp.URL, Credential{User: "bob"}), "his", atoll.ErrDenied, 401}, {as(unix.URL, Credential{User: "bob"}), "his", atoll.ErrDenied, 401},
		{as(tcp.URL, Credential{}), "his", atoll.ErrDenied, 401},
	} {
		e, err := w.c.Names.GetEntry(t.Context(), connect.NewRequest(&atollv1.GetEntryRequest{Path: w.path}))
		if !errors.Is(err, w.want) || err == nil && (e.Msg.Owner == "seen") != (w.path == "his") {
			t.Errorf("%+v gets %s: %v %v", w.c.cred, w.path, e, err)
		}
		in, err := w.c.Versions.Diff(t.Context(), connect.NewRequest(&atollv1.DiffRequest{}))
		if err == nil {
			in.Receive()
			err = errors.Join(in.Err(), in.Close())
		}
		if errors.Is(err, atoll.ErrDenied) == (w.profiles == 200) {
			t.Errorf("%+v reads a stream: %v", w.c.cred, err)
		}
		resp, err := w.c.Get(t.Context(), "/debug/pprof/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != w.profiles {
			t.Errorf("%+v gets profiles: %d", w.c.cred, resp.StatusCode)
		}
	}
}
