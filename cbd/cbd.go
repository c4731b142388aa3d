package cbd

import (
	"errors"
	"sync"
)

// Types and states of files, and what an AioContext does.
const (
	InodeDirectory     = 0
	InodePageFile      = 1
	InodeAppendFile    = 2
	InodeAppendECFile  = 3
	FileCreated        = 0
	FileDeleting       = 1
	FileCloning        = 2
	FileCloneInstalled = 3
	FileCloned         = 4
	FileBeingCloned    = 5
	OpRead             = 0
	OpWrite            = 1
)

// maxAio is how many reads and writes of a client run in the background at once.
const maxAio = 1024

// UserInfo says who calls. Each part has 255 bytes at most.
type UserInfo struct{ Owner, Password string }

// FileInfo is what StatFile tells.
type FileInfo struct {
	ID          uint64 `json:"id"`
	ParentID    uint64 `json:"parentid"`
	FileType    int    `json:"filetype"`
	Length      uint64 `json:"length"`
	Ctime       uint64 `json:"ctime"` // microseconds since 1970
	Filename    string `json:"filename"`
	Owner       string `json:"owner"`
	FileStatus  int    `json:"filestatus"`
	StripeUnit  uint64 `json:"stripeunit"`
	StripeCount uint64 `json:"stripecount"`
}

// CreateContext is what Create2 takes.
type CreateContext struct {
	Name                    string
	Length                  uint64
	User                    UserInfo
	Poolset                 string
	StripeUnit, StripeCount uint64
}

// AioContext is a read or write in the background. When it has ended, Ret is the
// number of bytes or a negative code and Cb is called, in another goroutine.
// Buf must not be touched in between.
type AioContext struct {
	Offset, Length uint64
	Ret            int
	Op             int
	Cb             func(*AioContext)
	Buf            []byte
}

// CBDClient is a client of one cluster. The zero CBDClient is ready for Init. All
// methods may be called concurrently.
type CBDClient struct {
	mu struct {
		sync.Mutex // held for memory work only
		servers    *servers
		files      map[int]*file
		next       int
		last       string
		aio        chan struct{} // bounds what runs in the background
	}
	wg sync.WaitGroup // what runs in the background
}

// Init reads client.conf; no server is asked. It returns 0, or -Failed. A second
// call does nothing.
func (c *CBDClient) Init(configPath string) int {
	if c.servers() != nil {
		return OK
	}
	conf, err := readConf(configPath)
	if err != nil {
		return c.result(fail(Failed, "%s: %v", configPath, err))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.servers == nil {
		c.mu.servers, c.mu.files, c.mu.aio = newServers(conf), map[int]*file{}, make(chan struct{}, maxAio)
	}
	return OK
}

// UnInit waits for what runs in the background, closes all files and forgets the
// configuration.
func (c *CBDClient) UnInit() {
	c.wg.Wait()
	c.mu.Lock()
	s, files := c.mu.servers, c.mu.files
	c.mu.servers, c.mu.files = nil, nil
	c.mu.Unlock()
	for _, f := range files {
		f.close()
	}
	if s != nil {
		s.close()
	}
}

// LastError returns the reason of this client's last failure, for people.
func (c *CBDClient) LastError() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.last
}

// Open returns a descriptor, 0 or more. The codes of a refusal are -1 for an
// empty owner and -2 for all else (see atoll.preciseOpen).
func (c *CBDClient) Open(filename string, user UserInfo) int {
	s := c.servers()
	if s == nil {
		return c.result(errNoInit())
	}
	if err := user.check(); err != nil {
		return c.result(err)
	}
	f, err := openFile(s, filename, user)
	if err != nil {
		return c.result(err)
	}
	c.mu.Lock()
	if c.mu.files == nil { // UnInit came in between
		c.mu.Unlock()
		f.close()
		return c.result(errNoInit())
	}
	defer c.mu.Unlock()
	fd := c.mu.next
	c.mu.next++
	c.mu.files[fd] = f
	return fd
}

// Close returns 0, or -Failed for a descriptor that is not open.
func (c *CBDClient) Close(fd int) int {
	c.mu.Lock()
	f := c.mu.files[fd]
	delete(c.mu.files, fd)
	c.mu.Unlock()
	if f == nil {
		return c.result(fail(Failed, "descriptor %d is not open", fd))
	}
	f.close()
	return OK
}

// Create makes a volume of size bytes.
func (c *CBDClient) Create(filename string, user UserInfo, size uint64) int {
	return c.Create2(CreateContext{Name: filename, User: user, Length: size})
}

// Create2 makes a volume as the context tells.
func (c *CBDClient) Create2(x CreateContext) int {
	return c.code("create", x.User, question{Path: x.Name, Length: x.Length, Poolset: x.Poolset, StripeUnit: x.StripeUnit, StripeCount: x.StripeCount})
}

// Unlink moves a volume to /RecycleBin.
func (c *CBDClient) Unlink(filename string, user UserInfo) int {
	return c.code("unlink", user, question{Path: filename})
}

// DeleteForce removes a file in /RecycleBin for good.
func (c *CBDClient) DeleteForce(filename string, user UserInfo) int {
	return c.code("deleteforce", user, question{Path: filename})
}

// Recover takes a file out of /RecycleBin: the one of fileID, or for 0 the newest
// that was at the path.
func (c *CBDClient) Recover(filename string, user UserInfo, fileID uint64) int {
	return c.code("recover", user, question{Path: filename, FileID: fileID})
}

// Rename renames a volume; one of the new name goes to /RecycleBin.
func (c *CBDClient) Rename(user UserInfo, oldpath, newpath string) int {
	return c.code("rename", user, question{Path: oldpath, NewPath: newpath})
}

// Extend makes a volume size bytes long.
func (c *CBDClient) Extend(filename string, user UserInfo, size uint64) int {
	return c.code("extend", user, question{Path: filename, Length: size})
}

// StatFile fills info.
func (c *CBDClient) StatFile(filename string, user UserInfo, info *FileInfo) int {
	a, err := c.call("stat", user, question{Path: filename})
	if err == nil {
		*info = a.File
	}
	return c.result(err)
}

// ChangeOwner gives a file to another owner; only root may.
func (c *CBDClient) ChangeOwner(filename, newOwner string, user UserInfo) int {
	return c.code("changeowner", user, question{Path: filename, NewOwner: newOwner})
}

// Listdir returns the names in a directory, and 0 or a negative code.
func (c *CBDClient) Listdir(dirpath string, user UserInfo) ([]string, int) {
	a, err := c.call("listdir", user, question{Path: dirpath})
	var names []string
	for _, f := range a.Files {
		names = append(names, f.Filename)
	}
	return names, c.result(err)
}

// Mkdir makes a directory; its parent must be there.
func (c *CBDClient) Mkdir(dirpath string, user UserInfo) int {
	return c.code("mkdir", user, question{Path: dirpath})
}

// Rmdir removes an empty directory.
func (c *CBDClient) Rmdir(dirpath string, user UserInfo) int {
	return c.code("rmdir", user, question{Path: dirpath})
}

// GetClusterId returns the cluster's id, "" if no server answers.
func (c *CBDClient) GetClusterId() string {
	a, err := c.call("clusterid", UserInfo{}, question{})
	c.result(err)
	return a.Cluster
}

// ListPoolset returns the names of the poolsets, none if no server answers.
func (c *CBDClient) ListPoolset() []string {
	a, err := c.call("poolsets", UserInfo{}, question{})
	c.result(err)
	return a.Poolsets
}

// Read fills the first length bytes of buf from offset and returns length, or a
// negative code. Both must be multiples of 4096.
func (c *CBDClient) Read(fd int, buf []byte, offset, length uint64) int {
	return c.transfer(fd, buf, offset, length, (*file).read)
}

// Write stores the first length bytes of buf at offset and returns length, or a
// negative code. Both must be multiples of 4096.
func (c *CBDClient) Write(fd int, buf []byte, offset, length uint64) int {
	return c.transfer(fd, buf, offset, length, (*file).write)
}

// transfer reads or writes.
func (c *CBDClient) transfer(fd int, buf []byte, offset, length uint64, do func(*file, []byte, uint64) error) int {
	if length == 0 {
		return 0
	}
	f, err := c.file(fd)
	if err == nil {
		err = f.check(offset, length)
	}
	if err == nil && length > uint64(len(buf)) {
		err = fail(ParamError, "%d bytes wanted, the buffer has %d", length, len(buf))
	}
	if err == nil {
		err = do(f, buf[:length], offset)
	}
	if err != nil {
		return c.result(err)
	}
	return int(length)
}

// AioRead begins a read and returns 0, or a negative code. It waits while many
// are under way.
func (c *CBDClient) AioRead(fd int, x *AioContext) int {
	x.Op = OpRead
	return c.begin(fd, x, c.Read)
}

// AioWrite begins a write and returns 0, or a negative code. It waits while many
// are under way.
func (c *CBDClient) AioWrite(fd int, x *AioContext) int {
	x.Op = OpWrite
	return c.begin(fd, x, c.Write)
}

// begin starts a transfer in the background.
func (c *CBDClient) begin(fd int, x *AioContext, do func(fd int, buf []byte, offset, length uint64) int) int {
	if _, err := c.file(fd); err != nil {
		return c.result(err)
	}
	if (x.Offset|x.Length)%blockBytes != 0 {
		return c.result(fail(NotAligned, "offset %d, length %d: want multiples of %d", x.Offset, x.Length, blockBytes))
	}
	c.mu.Lock()
	aio := c.mu.aio
	c.mu.Unlock()
	aio <- struct{}{}
	c.wg.Go(func() {
		defer func() { <-aio }()
		x.Ret = do(fd, x.Buf, x.Offset, x.Length)
		if x.Cb != nil {
			x.Cb(x)
		}
	})
	return OK
}

// servers returns the servers, nil before Init.
func (c *CBDClient) servers() *servers {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.servers
}

// file returns an open file.
func (c *CBDClient) file(fd int) (*file, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.mu.files[fd]; f != nil {
		return f, nil
	}
	return nil, fail(BadFD, "descriptor %d is not open", fd)
}

// errNoInit is the failure of calls before Init.
func errNoInit() error { return fail(Failed, "Init was not called") }

// check refuses names that do not fit into Curve's records.
func (u UserInfo) check() error {
	if len(u.Owner) > 255 || len(u.Password) > 255 {
		return fail(ParamError, "owner or password is longer than 255 bytes")
	}
	return nil
}

// call asks a server.
func (c *CBDClient) call(name string, user UserInfo, q question) (answer, error) {
	s := c.servers()
	if s == nil {
		return answer{}, errNoInit()
	}
	if err := user.check(); err != nil {
		return answer{}, err
	}
	q.Owner, q.Password = user.Owner, user.Password
	return s.call(name, q)
}

// code is call for those that answer nothing else.
func (c *CBDClient) code(name string, user UserInfo, q question) int {
	_, err := c.call(name, user, q)
	return c.result(err)
}

// result returns the code of an error, negated, and keeps its reason.
func (c *CBDClient) result(err error) int {
	if err == nil {
		return OK
	}
	code := InternalError
	var f *failure
	if errors.As(err, &f) {
		code = f.code
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.last = err.Error()
	return -code
}
