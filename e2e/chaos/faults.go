package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// StartAll starts every server that does not run, at once: controllers wait for
// each other.
func (c *Cluster) StartAll(ctx context.Context) error {
	errs := make([]error, len(c.Servers))
	var wg sync.WaitGroup
	for i, s := range c.Servers {
		if !s.Running() {
			wg.Go(func() { errs[i] = s.Start(ctx) })
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

// KillAll ends every server at once, as a power cut would.
func (c *Cluster) KillAll() {
	for _, s := range c.Servers {
		s.Signal(syscall.SIGKILL)
	}
	for _, s := range c.Servers {
		s.Kill()
	}
}

// EtcdLeader finds the controller whose etcd member leads.
func (c *Cluster) EtcdLeader(ctx context.Context) (*Server, error) {
	var errs []error
	for _, s := range c.Servers {
		if !s.Controller || !s.Running() {
			continue
		}
		leads, err := s.leads(ctx)
		if leads {
			return s, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errors.New("find the leader of etcd: there is none"), errors.Join(errs...))
}

// leads asks the server's etcd member whether it leads, through its socket.
func (s *Server) leads(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(s.dir, "d", "run", "etcd.sock"))
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://etcd/metrics", nil)
	if err != nil {
		return false, err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return false, fmt.Errorf("ask etcd of %s: %w", s.Name, err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "etcd_server_is_leader "); ok {
			return v == "1", nil
		}
	}
	return false, fmt.Errorf("ask etcd of %s: it does not tell (status %s)", s.Name, resp.Status)
}

// mountDisk gives a server's storage node a small file system of its own, so
// that it can be filled.
func mountDisk(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("mode=0700,size=%d", diskBytes)); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	return nil
}

// diskBytes is the size of a storage node's disk.
const diskBytes = 1 << 30

// ballast is the file that fills a disk.
const ballast = "ballast"

// Fill leaves no byte free on the server's disk.
func (s *Server) Fill() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.Disk, &st); err != nil {
		return fmt.Errorf("fill disk of %s: %w", s.Name, err)
	}
	if st.Blocks*uint64(st.Bsize) > diskBytes {
		return fmt.Errorf("fill disk of %s: it is not one of its own", s.Name)
	}
	f, err := os.Create(filepath.Join(s.Disk, ballast))
	if err != nil {
		return fmt.Errorf("fill disk of %s: %w", s.Name, err)
	}
	defer f.Close()
	zeros := make([]byte, 1<<20)
	for n := len(zeros); n >= 4096; {
		if _, err := f.Write(zeros[:n]); errors.Is(err, syscall.ENOSPC) {
			n /= 16
		} else if err != nil {
			return fmt.Errorf("fill disk of %s: %w", s.Name, err)
		}
	}
	return nil
}

// Empty gives the room back that Fill took.
func (s *Server) Empty() error {
	if err := os.Remove(filepath.Join(s.Disk, ballast)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("empty disk of %s: %w", s.Name, err)
	}
	return nil
}

// Flip changes a bit in up to n blocks of the segments on the server's disk and
// returns in how many.
func (s *Server) Flip(rng *rand.Rand, n int) (int, error) {
	files, err := filepath.Glob(filepath.Join(s.Disk, "segments", "*.seg"))
	if err != nil || len(files) == 0 {
		return 0, fmt.Errorf("flip bits of %s: no segments: %w", s.Name, err)
	}
	done := 0
	for range 20 * n {
		if done == n {
			break
		}
		hit, err := flip(files[rng.IntN(len(files))], rng)
		if errors.Is(err, os.ErrNotExist) {
			continue // it was deleted meanwhile
		}
		if err != nil {
			return done, fmt.Errorf("flip bits of %s: %w", s.Name, err)
		}
		if hit {
			done++
		}
	}
	return done, nil
}

// flip changes a bit in some block of a file, unless that block is all zeros.
func flip(path string, rng *rand.Rand) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() < blockBytes {
		return false, err
	}
	p := make([]byte, blockBytes)
	off := rng.Int64N(info.Size()/blockBytes) * blockBytes
	if _, err := f.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	if allZero(p) {
		return false, nil
	}
	bit := rng.IntN(8 * blockBytes)
	p[bit/8] ^= 1 << (bit % 8)
	// The byte alone: the rest of the block may be changing.
	if _, err := f.WriteAt(p[bit/8:bit/8+1], off+int64(bit/8)); err != nil {
		return false, err
	}
	return true, f.Sync()
}
