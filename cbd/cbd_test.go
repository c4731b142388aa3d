package cbd_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/cbd"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/curve"
	"github.com/atollstore/atoll/internal/gateway/curve/curvetest"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

const gib = 1 << 30

// sized is a disk whose size the backend tells.
type sized struct {
	*nbdtest.Memory
	size func() int64
}

func (s sized) Size() int64 { return s.size() }

// cluster is a server with the Curve gateway and volumes in memory.
type cluster struct {
	t    *testing.T
	b    *curvetest.Backend
	dir  string
	conf string // path of client.conf
	nbd  *nbd.Server

	socket atomic.Value // where nbd listens

	hook atomic.Pointer[func() error] // runs before every access to a disk

	opening, opened, together atomic.Int64 // calls of open: now, in all, most at once

	mu    sync.Mutex
	disks map[string]*sized
}

func start(t *testing.T, more ...string) *cluster {
	t.Helper()
	c := &cluster{t: t, b: curvetest.New(), dir: t.TempDir(), disks: map[string]*sized{}}
	c.b.URL = func(path string) string {
		return nbd.Address{Network: "unix", Addr: c.socket.Load().(string), Export: path}.String()
	}
	c.serveNBD("nbd")
	g := curve.New(curve.Options{Backend: c.b, Cluster: strings.Repeat("ab", 16)})
	h := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/open") {
			c.opened.Add(1)
			c.together.Store(max(c.together.Load(), c.opening.Add(1)))
			defer c.opening.Add(-1)
			time.Sleep(5 * time.Millisecond)
		}
		g.ServeHTTP(w, r)
	})}
	l, err := net.Listen("unix", filepath.Join(c.dir, "api"))
	if err != nil {
		t.Fatal(err)
	}
	go h.Serve(l)
	t.Cleanup(func() { h.Close() })
	c.conf = filepath.Join(c.dir, "client.conf")
	lines := append([]string{"# as of Curve", "mds.rpcTimeoutMS=500", " mds.listen.addr = unix:/nowhere/api, unix:" + l.Addr().String(), "global.logPath=./"}, more...)
	if err := os.WriteFile(c.conf, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// serveNBD starts a gateway for data, in place of the one before.
func (c *cluster) serveNBD(name string) {
	c.t.Helper()
	l, err := net.Listen("unix", filepath.Join(c.dir, name))
	if err != nil {
		c.t.Fatal(err)
	}
	s := nbd.Serve(nbd.Options{Listeners: []net.Listener{l}, Exports: c})
	c.t.Cleanup(func() { s.Close() })
	c.nbd = s
	c.socket.Store(l.Addr().String())
}

// client returns a client after Init, with more lines in its client.conf.
func (c *cluster) client(more ...string) *cbd.CBDClient {
	c.t.Helper()
	x, conf := new(cbd.CBDClient), c.conf
	if len(more) > 0 {
		text, err := os.ReadFile(conf)
		if err != nil {
			c.t.Fatal(err)
		}
		conf += ".more"
		if err := os.WriteFile(conf, []byte(string(text)+"\n"+strings.Join(more, "\n")), 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	if ret := x.Init(conf); ret != 0 {
		c.t.Fatal(ret, x.LastError())
	}
	c.t.Cleanup(x.UnInit)
	return x
}

func (c *cluster) List(context.Context) ([]nbd.ExportInfo, error) { return nil, nil }

func (c *cluster) Stat(ctx context.Context, name string) (nbd.Info, error) {
	v, err := c.b.Volume(ctx, name, false)
	return nbd.Info{Size: v.GetSizeBytes()}, err
}

func (c *cluster) Open(ctx context.Context, name string) (nbd.Device, nbd.Info, error) {
	info, err := c.Stat(ctx, name)
	if err != nil {
		return nil, info, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.disks[name]
	if d == nil {
		d = &sized{nbdtest.NewMemory(64 * gib), func() int64 {
			info, _ := c.Stat(context.Background(), name)
			return info.Size
		}}
		d.Before = func(context.Context, string, int64, int64) error {
			if fn := c.hook.Load(); fn != nil {
				return (*fn)()
			}
			return nil
		}
		c.disks[name] = d
	}
	return d, info, nil
}

func (c *cluster) Release(nbd.Device) {}

// before sets what runs before every access to a disk.
func (c *cluster) before(fn func() error) { c.hook.Store(&fn) }

var (
	me   = cbd.UserInfo{Owner: "me"}
	root = cbd.UserInfo{Owner: "root", Password: curve.DefaultRootPassword}
)

// want fails unless a call returned what it should.
func want(t *testing.T, x *cbd.CBDClient, got, code int) {
	t.Helper()
	if got != code {
		t.Errorf("returned %d (%s: %s), want %d", got, cbd.Strerror(got), x.LastError(), code)
	}
}

func TestFiles(t *testing.T) {
	c := start(t)
	x := c.client()
	other, nobody := cbd.UserInfo{Owner: "other"}, cbd.UserInfo{}
	want(t, x, x.Create("/disk", me, 10*gib), 0)
	want(t, x, x.Create("/disk", me, 10*gib), -cbd.Exists)
	want(t, x, x.Create("/small", me, 5*gib), -cbd.LengthNotSupport)
	want(t, x, x.Create("/none/disk", me, 10*gib), -cbd.NotExist)
	want(t, x, x.Create("disk", me, 10*gib), -cbd.ParamError)
	want(t, x, x.Create("/x", nobody, 10*gib), -cbd.AuthFail)
	want(t, x, x.Create("/x", cbd.UserInfo{Owner: strings.Repeat("x", 256)}, 10*gib), -cbd.ParamError)
	want(t, x, x.Create2(cbd.CreateContext{Name: "/striped", User: me, Length: 10 * gib, Poolset: "default", StripeUnit: 1 << 20, StripeCount: 4}), 0)
	want(t, x, x.Create2(cbd.CreateContext{Name: "/odd", User: me, Length: 10 * gib, StripeUnit: 5, StripeCount: 4}), -cbd.ParamError)
	want(t, x, x.Mkdir("/dir", me), 0)
	want(t, x, x.Create("/dir/disk", me, 10*gib), 0)
	want(t, x, x.Rmdir("/dir", me), -cbd.NotEmpty)
	want(t, x, x.Extend("/disk", me, 9*gib), -cbd.NoShrinkBiggerFile)
	want(t, x, x.Extend("/disk", me, 11*gib), 0)
	want(t, x, x.Extend("/dir", me, 11*gib), -cbd.NotSupport)
	want(t, x, x.ChangeOwner("/disk", "other", me), -cbd.AuthFail)
	want(t, x, x.ChangeOwner("/disk", "other", root), 0)
	want(t, x, x.Unlink("/disk", me), -cbd.AuthFail)
	want(t, x, x.Rename(other, "/disk", "/disk2"), 0)
	want(t, x, x.Rename(other, "/disk", "/disk2"), -cbd.NotExist)

	var info cbd.FileInfo
	want(t, x, x.StatFile("/striped", me, &info), 0)
	if info.Length != 10*gib || info.FileType != cbd.InodePageFile || info.Owner != "me" || info.Filename != "striped" ||
		info.StripeUnit != 1<<20 || info.StripeCount != 4 || info.FileStatus != cbd.FileCreated || info.ID == 0 ||
		time.Since(time.UnixMicro(int64(info.Ctime))).Abs() > time.Minute {
		t.Errorf("%+v", info)
	}
	want(t, x, x.StatFile("/none", me, &info), -cbd.NotExist)
	if info.Filename != "striped" {
		t.Error("a failed StatFile changes the record")
	}
	want(t, x, x.Unlink("/striped", me), 0)
	names, ret := x.Listdir("/RecycleBin", root)
	if len(names) != 1 || !strings.HasPrefix(names[0], fmt.Sprintf("striped-%d-", info.ID)) {
		t.Errorf("the recycle bin holds %q", names)
	}
	want(t, x, ret, 0)
	want(t, x, x.Recover("/striped", me, info.ID), 0)
	want(t, x, x.Recover("/striped", me, 0), -cbd.NotExist)
	want(t, x, x.DeleteForce("/striped", me), -cbd.NotSupport)
	names, ret = x.Listdir("/", root)
	slices.Sort(names)
	if want := []string{"RecycleBin", "dir", "disk2", "striped"}; !slices.Equal(names, want) || ret != 0 {
		t.Errorf("%d, %q, want %q", ret, names, want)
	}
	if names, ret = x.Listdir("/none", root); ret != -cbd.NotExist || names != nil {
		t.Errorf("%d, %q", ret, names)
	}
	if id := x.GetClusterId(); len(id) != 36 {
		t.Errorf("cluster %q", id)
	}
	if sets := x.ListPoolset(); !slices.Equal(sets, []string{"default"}) {
		t.Errorf("poolsets %q", sets)
	}
}

func TestData(t *testing.T) {
	c := start(t)
	x := c.client()
	want(t, x, x.Create("/disk", me, 10*gib), 0)
	want(t, x, x.Open("/none", me), -cbd.Failed)
	want(t, x, x.Open("/disk", cbd.UserInfo{Owner: "other"}), -cbd.Failed)
	want(t, x, x.Open("/disk", cbd.UserInfo{}), -cbd.Exists)
	fd := x.Open("/disk", me)
	want(t, x, fd, 0)
	want(t, x, x.Open("/disk", me), 1)
	page := bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
	got := make([]byte, len(page))
	n := uint64(len(page))
	want(t, x, x.Write(fd, page, 1<<20, n), len(page))
	want(t, x, x.Read(1, got, 1<<20, n), len(page))
	if !bytes.Equal(got, page) {
		t.Error("reads other than was written")
	}
	want(t, x, x.Read(fd, got, 1<<30, n), len(page))
	if !bytes.Equal(got, make([]byte, len(page))) {
		t.Error("what was never written is not zeros")
	}
	if c.disks["disk"].FUAs.Load() != 1 {
		t.Error("the write is not durable")
	}
	for _, r := range []struct {
		fd       int
		off, n   uint64
		buf, ret int
	}{
		{0, 0, 512, 4096, -cbd.NotAligned}, {0, 512, 4096, 4096, -cbd.NotAligned}, {0, 0, 4095, 0, -cbd.NotAligned}, {9, 0, 4096, 4096, -cbd.BadFD},
		{9, 0, 0, 0, 0}, {0, 3, 0, 0, 0}, {0, 10 * gib, 4096, 4096, -cbd.Failed}, {0, 10*gib - 4096, 8192, 8192, -cbd.Failed},
		{0, 10*gib - 4096, 4096, 4096, 4096}, {0, 0, 8192, 4096, -cbd.ParamError}, {0, 1<<64 - 4096, 8192, 8192, -cbd.Failed},
	} {
		want(t, x, x.Read(r.fd, got[:r.buf], r.off, r.n), r.ret)
		want(t, x, x.Write(r.fd, page[:r.buf], r.off, r.n), r.ret)
	}
	want(t, x, x.Extend("/disk", me, 12*gib), 0)
	want(t, x, x.Write(fd, page, 11*gib, n), len(page)) // the file is longer than when it was opened
	want(t, x, x.Close(1), 0)
	want(t, x, x.Close(1), -cbd.Failed)
	want(t, x, x.Read(1, got, 0, n), -cbd.BadFD)
	x.UnInit()
	want(t, x, x.Read(0, got, 0, n), -cbd.BadFD)
	want(t, x, x.Open("/disk", me), -cbd.Failed)
	want(t, x, x.Create("/y", me, 10*gib), -cbd.Failed)
}

// What fails on the server has its code.
func TestDataErrors(t *testing.T) {
	c := start(t)
	x := c.client()
	want(t, x, x.Create("/disk", me, 10*gib), 0)
	fd := x.Open("/disk", me)
	hasty := c.client("atoll.ioTimeoutMS=300") // for what is tried until the deadline
	want(t, hasty, hasty.Open("/disk", me), fd)
	for _, r := range []struct {
		kind error
		code int
	}{
		{atoll.ErrCorrupt, cbd.CRCError}, {atoll.ErrNoSpace, cbd.NoSpace}, {atoll.ErrIO, cbd.DiskFail},
		{atoll.ErrReadOnly, cbd.NotSupport}, {atoll.ErrUnavailable, cbd.Failed}, {atoll.ErrVersion, cbd.InternalError},
	} {
		c.before(func() error { return fmt.Errorf("the disk says: %w", r.kind) })
		y := x
		if r.kind == atoll.ErrUnavailable {
			y = hasty
		}
		want(t, y, y.Read(fd, make([]byte, 4096), 0, 4096), -r.code)
		want(t, y, y.Write(fd, make([]byte, 4096), 0, 4096), -r.code)
	}
	c.hook.Store(nil)
	want(t, x, x.Write(fd, make([]byte, 4096), 0, 4096), 4096)
}

// A volume that moves to another server, and servers that are gone: calls go on
// when it is back, or end with their deadline.
func TestMoves(t *testing.T) {
	c := start(t, "atoll.ioTimeoutMS=120000")
	x := c.client()
	want(t, x, x.Create("/disk", me, 10*gib), 0)
	fd := x.Open("/disk", me)
	page := bytes.Repeat([]byte{7}, 4096)
	want(t, x, x.Write(fd, page, 0, 4096), 4096)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var count atomic.Int64
	for i := range uint64(16) {
		wg.Go(func() {
			buf := make([]byte, 4096)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if ret := x.Write(fd, page, (i+1)<<20, 4096); ret != 4096 {
					t.Errorf("write returned %d: %s", ret, x.LastError())
					return
				}
				if ret := x.Read(fd, buf, (i+1)<<20, 4096); ret != 4096 || !bytes.Equal(buf, page) {
					t.Errorf("read returned %d: %s", ret, x.LastError())
					return
				}
				count.Add(1)
			}
		})
	}
	for i := range 3 {
		c.nbd.Close()
		before := count.Load() // 16 may be about to count what is done
		c.serveNBD(fmt.Sprintf("nbd%d", i))
		for deadline := time.Now().Add(time.Minute); count.Load() < before+20; {
			if time.Now().After(deadline) {
				t.Fatalf("nothing goes on after move %d: %s", i, x.LastError())
			}
			time.Sleep(time.Millisecond)
		}
	}
	close(stop)
	wg.Wait()
	if n, most := c.opened.Load(), c.together.Load(); most != 1 || n < 4 || n > 2000 {
		t.Errorf("%d calls of open, at most %d at once: the addresses are asked for by one goroutine at a time", n, most)
	}
}

func TestDeadlines(t *testing.T) {
	c := start(t)
	slow := c.client()
	want(t, slow, slow.Create("/disk", me, 10*gib), 0)
	x := c.client("atoll.ioTimeoutMS=200")
	fd := x.Open("/disk", me)
	release := make(chan struct{})
	c.before(func() error { <-release; return nil })
	began := time.Now()
	want(t, x, x.Read(fd, make([]byte, 4096), 0, 4096), -cbd.Failed)
	close(release)
	c.nbd.Close()
	want(t, x, x.Read(fd, make([]byte, 4096), 0, 4096), -cbd.Failed)
	if err := os.WriteFile(c.conf, []byte("mds.listen.addr=127.0.0.1:1,unix:/nowhere/api\natoll.timeoutMS=200"), 0o600); err != nil {
		t.Fatal(err)
	}
	y := c.client()
	want(t, y, y.Create("/y", me, 10*gib), -cbd.Failed)
	if id, sets := y.GetClusterId(), y.ListPoolset(); id != "" || sets != nil {
		t.Errorf("%q %q", id, sets)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("took %v", took)
	}
}

func TestAio(t *testing.T) {
	c := start(t)
	x := c.client()
	want(t, x, x.Create("/disk", me, 10*gib), 0)
	fd := x.Open("/disk", me)
	rng := rand.New(rand.NewPCG(1, 1))
	image := make([]byte, 4<<20)
	for i := range image {
		image[i] = byte(rng.Uint32())
	}
	for _, op := range []func(int, *cbd.AioContext) int{x.AioWrite, x.AioRead} {
		done := make(chan *cbd.AioContext, 64)
		back := make([]byte, len(image))
		for i := range uint64(64) {
			a := &cbd.AioContext{Offset: i << 16, Length: 1 << 16, Buf: back[i<<16:][:1<<16], Cb: func(a *cbd.AioContext) { done <- a }}
			copy(a.Buf, image[i<<16:])
			want(t, x, op(fd, a), 0)
		}
		for range 64 {
			a := <-done
			want(t, x, a.Ret, 1<<16)
		}
		if !bytes.Equal(back, image) {
			t.Error("other bytes came back")
		}
	}
	want(t, x, x.AioRead(5, &cbd.AioContext{Length: 4096}), -cbd.BadFD)
	want(t, x, x.AioWrite(fd, &cbd.AioContext{Length: 5}), -cbd.NotAligned)
	a := &cbd.AioContext{Offset: 20 * gib, Length: 4096, Buf: make([]byte, 4096)}
	want(t, x, x.AioRead(fd, a), 0)
	x.UnInit() // waits
	want(t, x, a.Ret, -cbd.Failed)
}

func TestInit(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"empty": "", "comment": "#mds.listen.addr=1.2.3.4:5", "port": "mds.listen.addr=host",
		"scheme": "mds.listen.addr=ftp://h:1", "time": "mds.listen.addr=h:1\natoll.timeoutMS=soon", "ca": "mds.listen.addr=h:1\natoll.caFile=/nowhere"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var x cbd.CBDClient
		if ret := x.Init(path); ret != -cbd.Failed || x.LastError() == "" {
			t.Errorf("%s: %d", name, ret)
		}
	}
	var x cbd.CBDClient
	want(t, &x, x.Init(filepath.Join(dir, "none")), -cbd.Failed)
	want(t, &x, x.Open("/x", me), -cbd.Failed)
	want(t, &x, x.Close(0), -cbd.Failed)
	x.UnInit()
	if cbd.Strerror(-6) != "NOTEXIST" || cbd.Strerror(100) != "UNKNOWN" || cbd.Strerror(77) != "code 77" {
		t.Error("names of codes")
	}
}
