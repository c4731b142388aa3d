package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/blockdev"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/transfer"
)

// attachment is what "volume attach" leaves in the runtime directory, so that
// "volume detach" finds it.
type attachment struct {
	Volume string `json:"volume"`
	Device string `json:"device"`
	Way    string `json:"way"`
	Mount  string `json:"mount,omitempty"`
	PID    int    `json:"pid"`
}

func attachDir() string { return filepath.Join(api.RuntimeDir(), "attach") }

// attachFile is where an attachment of a volume is noted.
func attachFile(volume string) string {
	return filepath.Join(attachDir(), strings.ReplaceAll(volume, "/", "%")+".json")
}

// attachLog is what the helper of a volume says. It stays only after an error.
func attachLog(volume string) string {
	return strings.TrimSuffix(attachFile(volume), ".json") + ".log"
}

type attachOptions struct {
	mkfs, mount string
	driver      string
	readOnly    bool
	foreground  bool
}

// How a block device can be made.
const (
	driverAny  = "any" // the first that works
	driverNBD  = "nbd"
	driverFUSE = "fuse"
)

// kernelConns is how many connections the kernel gets at most. Each is a queue,
// and the kernel makes no more queues than processors.
const kernelConns = 4

func (a *App) volumeAttach() *cobra.Command {
	var o attachOptions
	cmd := &cobra.Command{
		Use:   "attach NAME[@VERSION]",
		Short: "Make a local block device of a volume (root)",
		Long: `Make a local block device of a volume, with the kernel's NBD driver where there
is one, else with a FUSE file and a loop device. --mkfs makes a file system if
the volume has none; --mount mounts it. A helper process serves the device until
"atoll volume detach". Flushes of the device are durable on all copies. When the
server goes, the kernel's device fails; attach again then. A version becomes a
device that cannot be written.`,
		Example: "  sudo atoll volume attach disk1\n  sudo atoll volume attach disk1 --mkfs ext4 --mount /mnt/d",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if os.Getuid() != 0 {
				return api.WithHint(fmt.Errorf("attach makes a block device: %w", atoll.ErrDenied), "run it as root: sudo atoll volume attach "+args[0])
			}
			o.readOnly = o.readOnly || strings.Contains(args[0], "@")
			if o.mkfs != "" && o.readOnly {
				return usagef("--mkfs and --read-only contradict each other")
			}
			if o.driver != driverAny && o.driver != driverNBD && o.driver != driverFUSE {
				return usagef("unknown --driver %q; want any, nbd or fuse", o.driver)
			}
			if o.foreground {
				return a.serveAttachment(cmd, volumeName(args[0]), o)
			}
			return a.attach(cmd, volumeName(args[0]), o)
		},
	}
	cmd.Flags().StringVar(&o.mkfs, "mkfs", "", "make this file system (ext4, xfs…) unless there is one")
	cmd.Flags().StringVar(&o.mount, "mount", "", "mount it on this directory (made if absent)")
	cmd.Flags().BoolVar(&o.readOnly, "read-only", false, "refuse writes")
	cmd.Flags().StringVar(&o.driver, "driver", driverAny, "nbd (the kernel's), fuse (with a loop device) or any that works")
	cmd.Flags().BoolVar(&o.foreground, "foreground", false, "serve in this process until interrupted")
	return cmd
}

// attach starts the helper process, waits until it serves, and makes and mounts
// the file system.
func (a *App) attach(cmd *cobra.Command, volume string, o attachOptions) error {
	if old, err := readAttachment(volume); err == nil && alive(old.PID) {
		return fmt.Errorf("attach %s: it is attached as %s: %w", volume, old.Device, atoll.ErrExist)
	}
	if _, err := a.volume(cmd, volume, true); err != nil {
		return err
	}
	at, err := a.spawnHelper(volume, o)
	if err != nil {
		return err
	}
	if err := a.mountOn(cmd.Context(), &at, o); err != nil {
		return errors.Join(err, detach(at))
	}
	if a.output != "table" {
		b, err := json.Marshal(at)
		if err == nil {
			fmt.Fprintln(a.Out, string(b))
		}
		return err
	}
	text := at.Device
	if at.Mount != "" {
		text += " on " + at.Mount
	}
	fmt.Fprintln(a.Out, text)
	a.hint("through %s; undo with: atoll volume detach %s", at.Way, volume)
	return nil
}

// spawnHelper starts this program again as the helper and reads its first line.
func (a *App) spawnHelper(volume string, o attachOptions) (attachment, error) {
	self, err := os.Executable()
	if err != nil {
		return attachment{}, fmt.Errorf("find this program: %w", err)
	}
	args := []string{"volume", "attach", volume, "--foreground", "-o", "json", "--driver", o.driver}
	if o.readOnly {
		args = append(args, "--read-only")
	}
	if a.server != "" {
		args = append(args, "--server", a.server)
	}
	if a.tokenFile != "" {
		args = append(args, "--token-file", a.tokenFile)
	}
	helper := exec.Command(self, args...)
	helper.Args[0] = "atoll" // under another name it may be another program
	helper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	logPath := attachLog(volume)
	if err := os.MkdirAll(attachDir(), 0o700); err != nil {
		return attachment{}, fmt.Errorf("make %s: %w", attachDir(), err)
	}
	logFile, err := os.Create(logPath)
	if err != nil {
		return attachment{}, fmt.Errorf("make the helper's log: %w", err)
	}
	defer logFile.Close()
	helper.Stderr = logFile
	out, err := helper.StdoutPipe()
	if err != nil {
		return attachment{}, err
	}
	if err := helper.Start(); err != nil {
		return attachment{}, fmt.Errorf("start the helper: %w", err)
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	var at attachment
	if err != nil || json.Unmarshal(line, &at) != nil {
		werr := helper.Wait()
		text, _ := os.ReadFile(logPath)
		return at, fmt.Errorf("attach %s: %w", volume, helperError(string(text), werr))
	}
	return at, helper.Process.Release()
}

// told is an error that a helper has told: its words and its kind.
type told struct {
	text string
	kind error
}

// Error returns the helper's words.
func (e told) Error() string { return e.text }

// Unwrap makes errors.Is see the kind.
func (e told) Unwrap() error { return e.kind }

// helperError gives back the error that a helper printed in JSON as its last
// words, or else all that it said.
func helperError(log string, ended error) error {
	log = strings.TrimSpace(log)
	var last struct {
		Error struct{ Code, Message, Hint string }
	}
	line := log[strings.LastIndexByte(log, '\n')+1:]
	if json.Unmarshal([]byte(line), &last) != nil || last.Error.Message == "" {
		return fmt.Errorf("%s (%v): %w", log, ended, atoll.ErrUnavailable)
	}
	err := told{text: last.Error.Message, kind: atoll.ErrUnavailable}
	for _, kind := range atoll.Kinds() {
		if api.KindName(kind) == last.Error.Code {
			err.kind = kind
		}
	}
	if last.Error.Hint != "" {
		return api.WithHint(err, last.Error.Hint)
	}
	return err
}

// mountOn makes and mounts a file system as the options say.
func (a *App) mountOn(ctx context.Context, at *attachment, o attachOptions) error {
	if o.mkfs != "" && !hasFilesystem(ctx, at.Device) {
		if err := a.command(ctx, "mkfs."+o.mkfs, at.Device); err != nil {
			return err
		}
	}
	if o.mount == "" {
		return nil
	}
	if err := os.MkdirAll(o.mount, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", o.mount, err)
	}
	args := []string{at.Device, o.mount}
	if o.readOnly {
		args = append([]string{"-o", "ro"}, args...)
	}
	if err := a.command(ctx, "mount", args...); err != nil {
		return err
	}
	at.Mount = o.mount
	return writeAttachment(*at)
}

// hasFilesystem asks blkid whether the device holds something it knows.
func hasFilesystem(ctx context.Context, dev string) bool {
	out, err := exec.CommandContext(ctx, "blkid", "-p", "-o", "value", "-s", "TYPE", dev).Output()
	return err == nil && len(strings.TrimSpace(string(out))) > 0
}

// command runs a program and shows its output only when it fails.
func (a *App) command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%s is not installed: %w", name, atoll.ErrUnsupported)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %s: %w", name, strings.Join(args, " "), strings.TrimSpace(string(out)), atoll.ErrIO)
	}
	return nil
}

// serveAttachment is the helper: it serves the device until a signal.
func (a *App) serveAttachment(cmd *cobra.Command, volume string, o attachOptions) error {
	// A detach of a busy device must not end the helper, so the signals of the
	// process are not used as a context here.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	ctx := context.WithoutCancel(cmd.Context())
	v, err := a.volume(cmd, volume, true)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(attachDir(), 0o700); err != nil {
		return fmt.Errorf("make %s: %w", attachDir(), err)
	}
	dev, err := a.makeDevice(ctx, v, o)
	if err != nil {
		return err
	}
	at := attachment{Volume: volume, Device: dev.path, Way: dev.way, PID: os.Getpid()}
	if err := writeAttachment(at); err != nil {
		return errors.Join(err, dev.detach())
	}
	defer os.Remove(attachFile(volume))
	b, err := json.Marshal(at)
	if err != nil {
		return errors.Join(err, dev.detach())
	}
	fmt.Fprintln(a.Out, string(b))
	for {
		select {
		case <-dev.done:
			return fmt.Errorf("%s of volume %s has ended: %w", dev.path, volume, dev.detach())
		case <-signals:
		}
		err := dev.detach()
		switch {
		case err == nil:
			return removeIfThere(attachLog(volume))
		case !errors.Is(err, atoll.ErrBusy):
			return err
		}
		fmt.Fprintln(a.Err, err)
	}
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

// localDevice is a block device of a volume.
type localDevice struct {
	path, way string
	detach    func() error
	done      <-chan struct{} // closed when it ended on its own; nil if it cannot
}

// makeDevice makes a block device in the best way that works here.
func (a *App) makeDevice(ctx context.Context, v *atollv1.Volume, o attachOptions) (localDevice, error) {
	d, err := openVolume(ctx, v, 2)
	if err != nil {
		return localDevice{}, err
	}
	head := make([]byte, min(8<<10, d.Size()))
	if err := d.ReadAt(ctx, head, 0); err != nil {
		return localDevice{}, errors.Join(err, d.Close())
	}
	sector := blockdev.SectorBytes(head, d.Size())
	kernelErr := fmt.Errorf("not wanted: %w", atoll.ErrUnsupported)
	if o.driver != driverFUSE {
		var dev localDevice
		if dev, kernelErr = kernelDevice(ctx, v, sector, o.readOnly); kernelErr == nil {
			return dev, d.Close()
		}
	}
	if o.driver == driverNBD {
		return localDevice{}, errors.Join(kernelErr, d.Close())
	}
	dev, err := fuseDevice(d, sector, o.readOnly)
	if err != nil {
		return localDevice{}, errors.Join(err, fmt.Errorf("the kernel's NBD driver: %w", kernelErr), d.Close())
	}
	return dev, nil
}

// kernelDevice lets the kernel's NBD driver talk to the server.
func kernelDevice(ctx context.Context, v *atollv1.Volume, sector int, readOnly bool) (localDevice, error) {
	o := blockdev.KernelOptions{ReadOnly: readOnly, SectorBytes: sector}
	err := error(nil)
	for _, u := range v.Urls {
		var n nbd.Negotiated
		for len(o.Conns) < min(kernelConns, runtime.NumCPU()) {
			if n, err = nbd.Negotiate(ctx, u, nbd.DialOptions{}); err != nil {
				break
			}
			o.Conns, o.Size, o.Flags = append(o.Conns, n.Conn), n.Size, n.Flags
		}
		var k *blockdev.Kernel
		if err == nil {
			k, err = blockdev.AttachKernel(o)
		}
		if err == nil {
			return localDevice{path: k.Path, way: "the kernel's NBD driver", detach: k.Detach, done: k.Done()}, nil
		}
		for _, c := range o.Conns {
			c.Close()
		}
		o.Conns = nil
	}
	return localDevice{}, fmt.Errorf("use the kernel's NBD driver: %w", err)
}

// fuseDevice serves the volume from this process: a FUSE file and a loop device
// on it. It closes d at the end.
func fuseDevice(d *transfer.NBD, sector int, readOnly bool) (localDevice, error) {
	dir, err := os.MkdirTemp(attachDir(), "mnt-")
	if err != nil {
		return localDevice{}, fmt.Errorf("make a mount point: %w", err)
	}
	dev, err := blockdev.Attach(d, dir, sector, readOnly || d.ReadOnly())
	if err != nil {
		return localDevice{}, errors.Join(err, os.Remove(dir))
	}
	detach := func() error {
		if err := dev.Detach(); errors.Is(err, atoll.ErrBusy) {
			return err
		} else {
			return errors.Join(err, d.Close(), os.Remove(dir))
		}
	}
	return localDevice{path: dev.Path, way: "FUSE file and loop device", detach: detach}, nil
}

func (a *App) volumeDetach() *cobra.Command {
	return &cobra.Command{
		Use:     "detach NAME[@VERSION]",
		Short:   "Unmount and remove the block device of a volume (root)",
		Example: "  sudo atoll volume detach disk1",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			volume := volumeName(args[0])
			at, err := readAttachment(volume)
			if err != nil {
				return err
			}
			if at.Mount != "" {
				if err := a.command(cmd.Context(), "umount", at.Mount); err != nil && !strings.Contains(err.Error(), "not mounted") {
					return fmt.Errorf("%w; close what uses %s first: %w", err, at.Mount, atoll.ErrBusy)
				}
			}
			if err := detach(at); err != nil {
				return err
			}
			if a.output == "table" {
				fmt.Fprintf(a.Out, "%s: %s is gone\n", volume, at.Device)
			}
			return nil
		},
	}
}

// detach asks the helper to end, waits for it and passes on what it had to say,
// such as that the last flush failed.
func detach(at attachment) error {
	if !alive(at.PID) {
		return errors.Join(removeIfThere(attachFile(at.Volume)), helperSaid(at.Volume))
	}
	if err := syscall.Kill(at.PID, syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop helper %d: %w", at.PID, err)
	}
	for range 200 {
		if !alive(at.PID) {
			return helperSaid(at.Volume)
		}
		<-time.After(50 * time.Millisecond)
	}
	return fmt.Errorf("detach %s: the device is still in use: %w", at.Volume, atoll.ErrBusy)
}

// helperSaid returns the error that a helper ended with, nil if it had none.
func helperSaid(volume string) error {
	text, err := os.ReadFile(attachLog(volume))
	if os.IsNotExist(err) || err == nil && len(text) == 0 {
		return removeIfThere(attachLog(volume))
	}
	if err == nil {
		err = helperError(string(text), errors.New("ended"))
	}
	return errors.Join(fmt.Errorf("detach %s: %w", volume, err), removeIfThere(attachLog(volume)))
}

// alive reports whether the process runs and is not a zombie.
func alive(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func readAttachment(volume string) (at attachment, err error) {
	b, err := os.ReadFile(attachFile(volume))
	if os.IsNotExist(err) {
		return at, fmt.Errorf("volume %s is not attached here: %w", volume, atoll.ErrNotExist)
	}
	if err == nil {
		err = json.Unmarshal(b, &at)
	}
	if err != nil {
		return at, fmt.Errorf("read attachment of %s: %w", volume, err)
	}
	return at, nil
}

func writeAttachment(at attachment) error {
	b, err := json.Marshal(at)
	if err != nil {
		return err
	}
	tmp := attachFile(at.Volume) + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("note attachment: %w", err)
	}
	return os.Rename(tmp, attachFile(at.Volume))
}
